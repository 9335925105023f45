// Decode attention in the shape of an 8B model's layer (32 query heads, 8 kv heads, head_dim 128):
// the dense cache over a grid of batch sizes and lengths, every codec against it, ragged batches.
// Pages are scattered over the pool; calls go round the layers, so that the L2 cache holds none.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/bench/cuda/bench.h"

namespace spindle::bench {
namespace {

using enum kernels::KvFormat;
using kernels::DeviceKvBlock;
using kernels::DeviceKvHead;
using kernels::DeviceSequence;
using kernels::KvCodec;
using kernels::KvFormat;
using kernels::KvSide;
using Fill = Bench::Fill;

constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kDim = 128;
constexpr int kSinks = 4;
constexpr int kTail = 64;
constexpr int kEntries = 256;      // of a codebook, each side
constexpr int kVocabulary = 4096;  // rows of the token table that are used
constexpr std::int64_t kMaxPositions = 131072;
constexpr std::size_t kRotation = std::size_t{256} << 20;  // bytes of all layers, at least
const kernels::AttentionShape kShape{kHeads, kKvHeads, kDim};
const kernels::KvPageLayout kLayout{kDim, kernels::kKvPageTokens, DType::kF16};

// All dense, or sinks, coded blocks and a dense tail.
struct Format {
  std::string name;
  KvCodec codec;
  bool listed = false;  // every third position is not in the cache
  double bar = 0;       // speed over dense
};

// Places of pieces in pages of the pool, taken in random order. Pieces of one kind share pages.
class Pages {
 public:
  explicit Pages(std::size_t n) : order_(n) {
    std::iota(order_.begin(), order_.end(), 0U);
    std::shuffle(order_.begin(), order_.end(), std::mt19937(1));
  }
  std::uint32_t take() {
    if (next_ == order_.size()) throw std::runtime_error("the benchmark's pool is too small");
    return order_[next_++];
  }

 private:
  std::vector<std::uint32_t> order_;
  std::size_t next_ = 0;
};

struct Filling {
  std::size_t page = 0;
  std::size_t used = kLayout.page_bytes();

  std::uint32_t take(Pages& pages, std::size_t n_bytes) {
    if (n_bytes == 0) return kernels::kNoPlace;
    n_bytes = (n_bytes + 63) / 64 * 64;
    if (used + n_bytes > kLayout.page_bytes()) {
      page = pages.take();
      used = 0;
    }
    const std::size_t at = page * kLayout.page_bytes() + used;
    used += n_bytes;
    return static_cast<std::uint32_t>(at / kernels::kKvPlaceBytes);
  }
};

// Caches of a batch in n_layers layers, tables and all.
class Caches {
 public:
  Caches(const Bench& bench, const std::vector<int>& lengths, const Format& format)
      : bench_(bench), format_(format), is_dense_(format.codec == KvCodec{}) {
    std::size_t tokens = 0;
    for (const int length : lengths) tokens += static_cast<std::size_t>(length);
    // Dense bytes bound the bytes of every codec, but for pages that are not full.
    const std::size_t layer_bytes = tokens * kKvHeads * kDim * 4;
    n_layers_ = static_cast<int>(std::clamp<std::size_t>(kRotation / (layer_bytes / 4), 2, 32));
    std::size_t n_pages = 64;
    for (const int length : lengths) {
      const std::size_t per_head = static_cast<std::size_t>(length) / 32 + 16;
      n_pages += per_head * kKvHeads * static_cast<std::size_t>(n_layers_);
    }
    if (!is_dense_)
      n_pages = n_pages / 2 + 16 * lengths.size() * kKvHeads * static_cast<std::size_t>(n_layers_);
    pool_ = bench.random(n_pages * kLayout.page_bytes(), Fill::kNormalF16, 7);
    Pages pages(n_pages);
    make_rows();
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      std::vector<DeviceKvHead> heads;
      for (int head = 0; head < n_layers_ * kKvHeads; ++head) {
        heads.push_back(make_head(pages, lengths[i]));
      }
      DeviceSequence sequence;
      sequence.query_begin = static_cast<std::int32_t>(i);
      sequence.n_queries = 1;
      sequence.n_context = format.listed ? lengths[i] / 2 * 3 : lengths[i];
      sequence.heads = upload(heads);
      sequences_.push_back(sequence);
    }
    device_sequences_ = upload(sequences_);
    bench.context().synchronize();
  }

  int n_layers() const { return n_layers_; }
  int n_sequences() const { return static_cast<int>(sequences_.size()); }
  const DeviceSequence* sequences() const { return device_sequences_; }
  kernels::DeviceKvPool pool() const { return {pool_.data(), kLayout}; }
  double layer_bytes() const { return static_cast<double>(bytes_) / n_layers_; }

 private:
  template <typename T>
  const T* upload(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    const std::size_t n_bytes = values.size() * sizeof(T);
    buffers_.push_back(bench_.allocate(n_bytes));
    bench_.context().to_device(buffers_.back().data(), values.data(), n_bytes);
    return buffers_.back().as<T>();
  }

  void make_rows() {
    if (format_.codec.k == kToken) {
      const std::size_t n_bytes = std::size_t{kVocabulary} * kKvHeads * kDim * 2;
      k_rows_ = bench_.random(n_bytes, Fill::kNormalF16, 8);
      v_rows_ = bench_.random(n_bytes, Fill::kNormalF16, 9);
    }
  }

  // Ids below `limit`, written over the pool's random bytes.
  void write_ids(std::uint32_t place, int limit) {
    std::vector<std::uint16_t> ids(32);
    for (auto& id : ids) id = static_cast<std::uint16_t>(random_() % static_cast<unsigned>(limit));
    bench_.context().to_device(pool_.data() + std::size_t{place} * kernels::kKvPlaceBytes,
                               ids.data(), 64);
  }

  DeviceKvHead make_head(Pages& pages, int length) {
    DeviceKvHead head;
    const int n_body = is_dense_ ? 0 : (length - kSinks - kTail) / 32;
    const int n_tail = is_dense_ ? length : length - kSinks - 32 * n_body;
    const int n_context = format_.listed ? length / 2 * 3 : length;
    std::vector<DeviceKvBlock> blocks;
    if (!is_dense_) {
      Filling sinks;
      DeviceKvBlock block;
      block.capacity = kSinks;
      block.end = kSinks;
      block.k_codes = sinks.take(pages, kSinks * kDim * 2);
      block.v_codes = sinks.take(pages, kSinks * kDim * 2);
      bytes_ += kSinks * kDim * 4;
      blocks.push_back(block);
      Filling parts[5];
      for (int i = 0; i < n_body; ++i) {
        block = {};
        block.k_format = format_.codec.k;
        block.v_format = format_.codec.v;
        block.end = 32;
        const auto k = kernels::kv_side_bytes(block.k_format, KvSide::kKey, kDim, DType::kF16);
        const auto v = kernels::kv_side_bytes(block.v_format, KvSide::kValue, kDim, DType::kF16);
        block.k_codes = parts[0].take(pages, k.codes);
        block.k_scales = parts[1].take(pages, k.scales);
        block.v_codes = parts[2].take(pages, v.codes);
        block.v_scales = parts[3].take(pages, v.scales);
        bytes_ += k.total() + v.total();
        if (block.k_format == kCodebook) write_ids(block.k_codes, kEntries);
        if (block.v_format == kCodebook) write_ids(block.v_codes, kEntries);
        if (block.k_format == kToken) write_ids(block.k_codes, kVocabulary);
        block.first_position = kSinks + 32 * i;
        if (format_.listed) {
          block.positions = parts[4].take(pages, 128);
          std::vector<std::uint32_t> positions;
          for (int t = 0; t < 32; ++t) {
            positions.push_back(static_cast<std::uint32_t>(kSinks + (32 * i + t) * 3 / 2));
          }
          bench_.context().to_device(
              pool_.data() + std::size_t{block.positions} * kernels::kKvPlaceBytes,
              positions.data(), 128);
          head.wide_positions = 1;
          block.first_position = static_cast<std::int32_t>(positions[0]);
          bytes_ += 128;
        }
        blocks.push_back(block);
      }
      Filling means;
      head.k_mean = means.take(pages, kDim * 2);
      head.v_mean = means.take(pages, kDim * 2);
      if (format_.codec.k == kCodebook) head.k_entries = make_entries(pages);
      if (format_.codec.v == kCodebook) head.v_entries = make_entries(pages);
      if (format_.codec.k == kToken) {
        head.k_tokens = k_rows_.as<std::uint16_t>() + n_heads_ % kKvHeads * kDim;
        head.v_tokens = v_rows_.as<std::uint16_t>() + n_heads_ % kKvHeads * kDim;
        head.token_stride = kKvHeads * kDim;
      }
    }
    ++n_heads_;
    head.blocks = upload(blocks);
    head.n_blocks = static_cast<std::int32_t>(blocks.size());
    head.tail_origin = n_context - n_tail;
    head.tail_first = head.tail_origin;
    std::vector<std::uint32_t> tail((static_cast<std::size_t>(n_tail) + 31) / 32);
    for (auto& page : tail) page = pages.take();
    bytes_ += static_cast<std::size_t>(n_tail) * kDim * 4;
    head.pages = upload(tail);
    return head;
  }

  const std::uint32_t* make_entries(Pages& pages) {
    std::vector<std::uint32_t> places;
    Filling chunks;
    for (int i = 0; i < kEntries / 16; ++i) places.push_back(chunks.take(pages, 32 * kDim));
    bytes_ += std::size_t{kEntries} * kDim * 2;
    return upload(places);
  }

  const Bench& bench_;
  Format format_;
  bool is_dense_;
  int n_layers_ = 0;
  int n_heads_ = 0;
  std::size_t bytes_ = 0;
  std::mt19937 random_{3};
  DeviceBuffer pool_;
  DeviceBuffer k_rows_;
  DeviceBuffer v_rows_;
  std::vector<DeviceBuffer> buffers_;
  std::vector<DeviceSequence> sequences_;
  const DeviceSequence* device_sequences_ = nullptr;
};

class DecodeBench {
 public:
  DecodeBench()
      : cos_(bench_.random(kMaxPositions * kDim / 2 * 4, Fill::kNormalF32, 4)),
        sin_(bench_.random(kMaxPositions * kDim / 2 * 4, Fill::kNormalF32, 5)) {}

  // Microseconds of one layer.
  double measure(const std::vector<int>& lengths, const Format& format, double& bytes) {
    const Caches caches(bench_, lengths, format);
    const auto n = static_cast<std::int64_t>(lengths.size());
    const std::int64_t width = kHeads * kDim;
    const DeviceBuffer q = bench_.random(static_cast<std::size_t>(n * width) * 2, Fill::kNormalF16);
    const DeviceBuffer out = bench_.allocate(static_cast<std::size_t>(n * width) * 2);
    auto workspace = kernels::DecodeWorkspace::create(bench_.context(), static_cast<int>(n),
                                                      caches.n_layers(), kShape);
    if (!workspace.ok()) throw std::runtime_error(workspace.status().to_string());
    kernels::plan_decode(bench_.context(), caches.sequences(), caches.n_sequences(),
                         caches.n_layers(), kShape, *workspace);
    const std::uint32_t mask =
        1U << static_cast<unsigned>(format.codec.k) | 1U << static_cast<unsigned>(format.codec.v);
    const kernels::DecodeFormats formats = kernels::decode_formats(mask);
    const kernels::DeviceRope rope{cos_.as<float>(), sin_.as<float>(), kMaxPositions, kDim, 1.0F};
    const double us = bench_.median_us(
        [&](int call) {
          kernels::attention_decode(bench_.context(), {q.as<F16>(), n, width}, caches.sequences(),
                                    caches.n_sequences(), call % caches.n_layers(), kShape,
                                    caches.pool(), 0.0884F, rope, formats, *workspace,
                                    {out.as<Bf16>(), n, width});
        },
        40, 5);
    bytes = caches.layer_bytes() + static_cast<double>(n * width) * 4;
    return us;
  }

  double plan_us(int batch, int length) {
    const Caches caches(bench_, std::vector<int>(static_cast<std::size_t>(batch), length), {});
    auto workspace =
        kernels::DecodeWorkspace::create(bench_.context(), batch, caches.n_layers(), kShape);
    return bench_.median_us([&](int) {
      kernels::plan_decode(bench_.context(), caches.sequences(), caches.n_sequences(),
                           caches.n_layers(), kShape, *workspace);
    });
  }

  void dense(int batch, int length, double bar, const std::string& note) {
    double bytes = 0;
    const double us = measure(std::vector<int>(static_cast<std::size_t>(batch), length), {}, bytes);
    report("attention_decode_dense", batch, length, us, bytes, bar, note);
  }

  void codecs(int batch, int length, const std::vector<Format>& formats) {
    const std::vector<int> lengths(static_cast<std::size_t>(batch), length);
    double bytes = 0;
    const double dense_us = measure(lengths, {}, bytes);
    for (const Format& format : formats) {
      const double us = measure(lengths, format, bytes);
      char note[96];
      std::snprintf(note, sizeof(note), "%.2fx of dense (bar %.2f%s)", dense_us / us, format.bar,
                    dense_us / us >= format.bar ? "" : ", MISSED");
      report("attention_decode_" + format.name, batch, length, us, bytes, 0, note);
    }
  }

  // The same number of tokens, evenly and unevenly.
  void ragged(const Format& format) {
    const std::vector<int> even(32, 8192);
    std::vector<int> uneven;
    for (int i = 0; i < 32; ++i) uneven.push_back(i % 8 == 0 ? 8192 * 6 : 8192 * 2 / 7 / 32 * 32);
    double even_bytes = 0;
    double bytes = 0;
    const double even_us = measure(even, format, even_bytes);
    const double us = measure(uneven, format, bytes);
    const double ratio = bytes / us / (even_bytes / even_us);
    char note[96];
    std::snprintf(note, sizeof(note), "%.2f of the uniform batch's bytes per second (bar 0.90%s)",
                  ratio, ratio >= 0.9 ? "" : ", MISSED");
    report("attention_decode_ragged_" + format.name, 32, 8192, us, bytes, 0, note);
  }

  void report(const std::string& name, int batch, int length, double us, double bytes, double bar,
              const std::string& note) {
    const double tokens = static_cast<double>(batch) * length;
    bench_.report({.name = name,
                   .parameters = {{"batch", static_cast<double>(batch)},
                                  {"tokens", static_cast<double>(length)}},
                   .median_us = us,
                   .bytes = bytes,
                   .flops = 4.0 * tokens * kHeads * kDim,
                   .yardstick = "copy",
                   .bar = bar,
                   .note = note});
  }
  const Bench& bench() const { return bench_; }

 private:
  Bench bench_;
  DeviceBuffer cos_;
  DeviceBuffer sin_;
};

// All of it, or only the named codecs at one size, for a profiler.
void run(const std::vector<std::string>& names) {
  DecodeBench bench;
  const double copy = bench.bench().copy_bytes_per_second() * 1e-12;
  std::fprintf(stderr, "copy %.2f TB/s\n", copy);
  const std::vector<Format> formats = {
      {.name = "int4", .codec = {kInt4, kInt4}, .bar = 2.5},
      {.name = "lloyd44", .codec = {kLloyd4, kLloyd4}, .bar = 1.8},
      {.name = "lloyd44_listed", .codec = {kLloyd4, kLloyd4}, .listed = true, .bar = 1.8},
      {.name = "lloyd32", .codec = {kLloyd3, kLloyd2}, .bar = 1.8},
      {.name = "codebook", .codec = {kCodebook, kCodebook}, .bar = 1.5},
      {.name = "token", .codec = {kToken, kToken}, .bar = 1.0},
      {.name = "kivi4", .codec = {kKivi4, kKivi4}, .bar = 1.0},
      {.name = "kivi2", .codec = {kKivi2, kKivi2}, .bar = 1.0},
  };
  if (!names.empty()) {
    std::vector<Format> chosen;
    for (const std::string& name : names) {
      const auto format = std::ranges::find(formats, name, &Format::name);
      if (format == formats.end()) throw std::runtime_error("no codec is called " + name);
      chosen.push_back(*format);
    }
    bench.codecs(32, 16384, chosen);
    return;
  }
  bench.dense(32, 4096, 0.85, "cuDNN SDPA 0.83");
  bench.dense(32, 16384, 0.92, "cuDNN SDPA 0.95");
  bench.dense(32, 32768, 0.92, "");
  bench.dense(16, 4096, 0, "");
  bench.dense(16, 16384, 0, "");
  bench.dense(16, 32768, 0, "");
  bench.dense(1, 160, 0, "");
  bench.dense(1, 1024, 0, "");
  bench.dense(1, 4096, 0, "");
  bench.dense(1, 16384, 0, "");
  bench.dense(1, 32768, 0.70, "cuDNN SDPA 0.47");
  bench.codecs(32, 4096, {formats[0], formats[1]});
  bench.codecs(32, 16384, formats);
  bench.codecs(32, 32768, formats);
  bench.codecs(1, 32768, {formats[0], formats[1]});
  bench.ragged({.name = "dense", .codec = {}});
  bench.ragged({.name = "int4", .codec = {kInt4, kInt4}});
  std::fprintf(stderr, "plan of 32 sequences: %.1f us\n", bench.plan_us(32, 4096));
}

}  // namespace
}  // namespace spindle::bench

// usage: cuda_attention_decode_bench [CODEC...]
int main(int argc, char** argv) {
  try {
    spindle::bench::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
