#include "kernels/bench/kv_attention_bench.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/bench/yardsticks.h"

namespace spindle::kernels {
namespace {

constexpr int kHeadDim = 64;
constexpr int kGroup = 2;
constexpr std::int64_t kContext = 8192;
constexpr std::int64_t kVocabulary = 8192;
constexpr KvPageLayout kLayout{kHeadDim, kKvPageTokens, DType::kF16};

// How the tokens before the tail are stored.
struct CacheKind {
  const char* name;
  KvCodec codec;
  bool blocks = true;            // else the tail holds everything
  std::int64_t keep_one_of = 1;  // tokens that stay
  bool listed = false;           // positions are listed
};

struct SharedTables {
  std::vector<std::uint16_t> mean = std::vector<std::uint16_t>(kHeadDim, 0x2c00);
  // Rows of two heads.
  std::vector<std::uint16_t> k_tokens =
      std::vector<std::uint16_t>(kVocabulary * 2 * kHeadDim, 0x2c00);
  std::vector<std::uint16_t> v_tokens = k_tokens;
  RopeTable rope = make_rope();

  static RopeTable make_rope() {
    std::vector<float> inv_freq;
    for (int i = 0; i < kHeadDim; i += 2) {
      inv_freq.push_back(std::pow(10000.0F, -static_cast<float>(i) / kHeadDim));
    }
    return RopeTable::create(inv_freq, kContext).value();
  }
};

// The cache of one head in one buffer of its own: random codes, small positive scales and values.
class HeadCache {
 public:
  HeadCache(const SharedTables& tables, const CacheKind& kind, std::int64_t n_tail,
            std::mt19937_64& random) {
    context_.k_mean = context_.v_mean = tables.mean.data();
    context_.k_tokens = tables.k_tokens.data();
    context_.v_tokens = tables.v_tokens.data();
    context_.token_stride = 2 * kHeadDim;
    const std::int64_t tail = kind.blocks ? n_tail : kContext;
    const std::int64_t n_blocks = (kContext - tail) / kind.keep_one_of / kKvBlockTokens;
    const KvSideBytes k = kv_side_bytes(kind.codec.k, KvSide::kKey, kHeadDim, DType::kF16);
    const KvSideBytes v = kv_side_bytes(kind.codec.v, KvSide::kValue, kHeadDim, DType::kF16);
    const std::size_t list_bytes = kind.listed ? 64 : 0;
    const std::size_t block_bytes = k.total() + v.total() + list_bytes;
    const std::int64_t n_pages = tail / kKvPageTokens;
    bytes_ = static_cast<std::size_t>(n_blocks) * block_bytes +
             static_cast<std::size_t>(n_pages) * kLayout.page_bytes();
    storage_.resize(bytes_ + 64);
    std::byte* next = storage_.data();
    next += (64 - reinterpret_cast<std::uintptr_t>(next) % 64) % 64;
    const auto take = [&next](std::size_t n, int fill) {
      std::byte* piece = next;
      next += n;
      std::memset(piece, fill, n);
      return piece;
    };
    for (std::int64_t i = 0; i < n_blocks; ++i) {
      KvBlock block;
      block.codec = kind.codec;
      block.end = kKvBlockTokens;
      const std::int64_t first = i * kKvBlockTokens * kind.keep_one_of;
      block.first_position = static_cast<std::int32_t>(first);
      block.k = {take_codes(kind.codec.k, k.codes, random, next), nullptr};
      block.k.scales = take(k.scales, 0x2c);
      block.v = {take_codes(kind.codec.v, v.codes, random, next), nullptr};
      block.v.scales = take(v.scales, 0x2c);
      if (kind.listed) {
        std::byte* list = take(list_bytes, 0);
        for (std::int64_t t = 0; t < kKvBlockTokens; ++t) {
          const auto position = static_cast<std::uint16_t>(first + t * kind.keep_one_of);
          std::memcpy(list + 2 * t, &position, 2);
        }
        block.positions = list;
      }
      blocks_.push_back(block);
    }
    for (std::int64_t i = 0; i < n_pages; ++i) pages_.push_back(take(kLayout.page_bytes(), 0x2c));
    tail_origin_ = kContext - tail;
    if (kind.codec.k == KvFormat::kToken) {
      bytes_ += static_cast<std::size_t>(n_blocks * kKvBlockTokens * kHeadDim) * 4;
    }
  }
  HeadCache(const HeadCache&) = delete;

  KvHeadPages view() const {
    return {pages_.data(),  tail_origin_,        tail_origin_,
            blocks_.data(), std::ssize(blocks_), &context_};
  }
  std::size_t bytes() const { return bytes_; }

 private:
  static const std::byte* take_codes(KvFormat format, std::size_t n, std::mt19937_64& random,
                                     std::byte*& next) {
    std::byte* piece = next;
    next += n;
    std::memset(piece, 0x2c, n);
    for (std::size_t i = 0; i + 2 <= n; i += 2) {
      auto code = static_cast<std::uint16_t>(random());
      // About as skewed as words of a text: half of the tokens are among the first 1.5 %.
      if (format == KvFormat::kToken) {
        const double u = static_cast<double>(code) / 65536.0;
        code = static_cast<std::uint16_t>(std::pow(u, 6.0) * kVocabulary);
      }
      if (format != KvFormat::kRaw) std::memcpy(piece + i, &code, 2);
    }
    return piece;
  }

  std::vector<std::byte> storage_;
  std::vector<KvBlock> blocks_;
  std::vector<const std::byte*> pages_;
  KvHeadContext context_;
  std::int64_t tail_origin_ = 0;
  std::size_t bytes_ = 0;
};

struct Measured {
  double seconds_per_head;
  double bytes_per_head;
};

Measured measure(const CpuContext& context, const SharedTables& tables, const CacheKind& kind,
                 int n_heads, std::int64_t n_queries) {
  std::mt19937_64 random(1);
  std::vector<std::unique_ptr<HeadCache>> caches;
  std::vector<KvHeadPages> heads;
  const std::int64_t n_tail = n_queries == 1 ? 64 : n_queries;
  for (int head = 0; head < n_heads; ++head) {
    caches.push_back(std::make_unique<HeadCache>(tables, kind, n_tail, random));
    heads.push_back(caches.back()->view());
  }
  const AttentionShape shape{n_heads * kGroup, n_heads, kHeadDim};
  const std::int64_t width = std::int64_t{shape.n_heads} * kHeadDim;
  std::vector<float> q(static_cast<std::size_t>(n_queries * width));
  for (float& value : q) value = static_cast<float>(random() % 1024) / 1024.0F - 0.5F;
  std::vector<float> out(q.size());
  const std::vector<AttentionSequence> sequences = {{0, n_queries, kContext, heads.data()}};
  const double seconds = best_seconds([&] {
    attention(context, {q.data(), n_queries, width}, sequences, shape, kLayout, 0.125F,
              {out.data(), n_queries, width}, &tables.rope);
  });
  return {seconds / n_heads, static_cast<double>(caches[0]->bytes())};
}

}  // namespace

void bench_kv_attention(const CpuContext& context) {
  using enum KvFormat;
  const std::vector<CacheKind> kinds = {
      {.name = "raw f16 pages", .codec = {}, .blocks = false},
      {.name = "raw f16 blocks", .codec = {}},
      {.name = "int4", .codec = {kInt4, kInt4}},
      {.name = "kivi4", .codec = {kKivi4, kKivi4}},
      {.name = "kivi2", .codec = {kKivi2, kKivi2}},
      {.name = "lloyd4/4", .codec = {kLloyd4, kLloyd4}},
      {.name = "lloyd4/4, listed", .codec = {kLloyd4, kLloyd4}, .listed = true},
      {.name = "lloyd4/4, 20 % kept",
       .codec = {kLloyd4, kLloyd4},
       .keep_one_of = 5,
       .listed = true},
      {.name = "lloyd3/2", .codec = {kLloyd3, kLloyd2}},
      {.name = "raw K, lloyd4 V", .codec = {kRaw, kLloyd4}},
      {.name = "token table", .codec = {kToken, kToken}},
  };
  const SharedTables tables;
  for (const std::int64_t n_queries : {1, 512}) {
    const int n_heads = n_queries == 1 ? 24 : 2;
    std::printf(
        "attention over %ld tokens, %ld queries, group %d, head_dim %d, %d heads, one thread\n",
        kContext, n_queries, kGroup, kHeadDim, n_heads);
    std::printf("%-22s %12s %10s %8s %8s\n", "cache", "us per head", "KB read", "GB/s", "to raw");
    double raw = 0.0;
    for (const CacheKind& kind : kinds) {
      const Measured m = measure(context, tables, kind, n_heads, n_queries);
      if (raw == 0.0) raw = m.seconds_per_head;
      std::printf("%-22s %12.1f %10.1f %8.1f %8.2f\n", kind.name, m.seconds_per_head * 1e6,
                  m.bytes_per_head * 1e-3, m.bytes_per_head / m.seconds_per_head * 1e-9,
                  m.seconds_per_head / raw);
    }
  }
}

}  // namespace spindle::kernels
