#pragma once
// Random caches of compressed blocks for the attention tests, and what they hold in fp64: every
// visible slot's key after RoPE and value, from the codecs' own oracles.

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/codebook.h"
#include "kernels/kv_compact.h"
#include "kernels/kv_quant.h"
#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {

inline constexpr std::int64_t kVocabulary = 50;

inline float rounded_to(float value, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return value;
    case DType::kF16:
      return f16_to_f32(f32_to_f16(value));
    case DType::kBF16:
      return bf16_to_f32(f32_to_bf16(value));
  }
  return value;
}

inline std::vector<std::uint16_t> f16_of(std::span<const float> values) {
  std::vector<std::uint16_t> halves;
  for (const float value : values) halves.push_back(f32_to_f16(value));
  return halves;
}

// Bytes at a multiple of 64 between guards.
class AlignedBytes {
 public:
  AlignedBytes(std::size_t n, std::byte fill) : n_(n), storage_(n + 3 * kGuard, kFill) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    begin_ = kGuard + (kGuard - address % kGuard) % kGuard;
    std::fill_n(data(), n, fill);
  }
  std::byte* data() { return storage_.data() + begin_; }
  void check() const {
    for (std::size_t i = 0; i < storage_.size(); ++i) {
      if (i < begin_ || i >= begin_ + n_) {
        ASSERT_EQ(storage_[i], kFill) << "written outside";
      }
    }
  }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr std::byte kFill{0xa5};
  std::size_t n_;
  std::size_t begin_;
  std::vector<std::byte> storage_;
};

// Which of a head's choices are made how; the rest is drawn.
struct HeadOptions {
  int head_dim = 64;
  DType dtype = DType::kF16;
  std::vector<KvCodec> codecs;      // of the blocks, in order
  std::int64_t max_gap = 3;         // between tokens of blocks that list their positions
  std::int64_t max_tail_first = 0;  // of the first query
};

class BlockCache {
 public:
  // A cache of n_context positions of which the blocks hold some of those before the tail.
  BlockCache(Random& random, const RopeTable& rope, const HeadOptions& options,
             std::int64_t n_context)
      : random_(random),
        rope_(rope),
        options_(options),
        layout_{options.head_dim, kKvPageTokens, options.dtype} {
    make_context();
    for (std::size_t i = 0; i < options.codecs.size(); ++i) add_block(options.codecs[i], i);
    make_tail(n_context);
  }
  BlockCache(const BlockCache&) = delete;

  KvHeadPages view() const {
    return {.pages = pages_.data(),
            .tail_origin = tail_origin_,
            .tail_first = tail_first_,
            .blocks = blocks_.data(),
            .n_blocks = static_cast<std::int64_t>(blocks_.size()),
            .context = &context_};
  }
  // Visible slots in order of position: position, key after RoPE, value.
  const std::vector<std::int64_t>& positions() const { return positions_; }
  const double* key(std::size_t slot) const { return keys_.data() + slot * dim(); }
  const double* value(std::size_t slot) const { return values_.data() + slot * dim(); }
  std::vector<KvBlock>& blocks() { return blocks_; }
  void check_guards() const {
    for (const AlignedBytes& bytes : storage_) bytes.check();
  }

 private:
  std::size_t dim() const { return static_cast<std::size_t>(options_.head_dim); }
  std::byte* bytes(std::size_t n, std::byte fill = std::byte{0}) {
    return storage_.emplace_back(n, fill).data();
  }

  void make_context() {
    const int d = options_.head_dim;
    context_.wide_positions = random_.below(2) == 1;
    context_.wide_ids = random_.below(2) == 1;
    k_mean_ = f16_of(random_.normals(d));
    v_mean_ = f16_of(random_.normals(d));
    context_.k_mean = k_mean_.data();
    context_.v_mean = v_mean_.data();
    for (int side = 0; side < 2; ++side) {
      Codebook& book = books_[side];
      book.head_dim = d;
      for (std::int64_t e = 0; e < 37; ++e) {
        std::vector<float> entry = random_.normals(d);
        for (float& x : entry) x /= std::sqrt(static_cast<float>(d));
        const std::vector<std::uint16_t> halves = f16_of(entry);
        book.entries.insert(book.entries.end(), halves.begin(), halves.end());
      }
      const std::size_t chunk_bytes = kCodebookChunkEntries * dim() * 2;
      for (std::size_t at = 0; at < book.entries.size() * 2; at += chunk_bytes) {
        std::byte* chunk = bytes(chunk_bytes);
        std::memcpy(chunk, reinterpret_cast<const std::byte*>(book.entries.data()) + at,
                    std::min(chunk_bytes, book.entries.size() * 2 - at));
        chunks_[side].push_back(chunk);
      }
    }
    context_.k_entries = chunks_[0].data();
    context_.v_entries = chunks_[1].data();
    // Rows of two heads: this one is the second.
    context_.token_stride = 2 * d;
    k_table_ = f16_of(random_.normals(kVocabulary * 2 * d));
    v_table_ = f16_of(random_.normals(kVocabulary * 2 * d));
    context_.k_tokens = k_table_.data() + d;
    context_.v_tokens = v_table_.data() + d;
  }

  // Numbers at [0, n), and past them the largest there are: they must not be used.
  std::byte* index_list(const std::vector<std::int64_t>& values, bool wide) {
    std::byte* list = bytes(wide ? 128 : 64, std::byte{0xff});
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::memcpy(list + i * (wide ? 4 : 2), &values[i], wide ? 4 : 2);
    }
    return list;
  }

  void add_block(KvCodec codec, std::size_t index) {
    const bool is_kivi = codec.k == KvFormat::kKivi4 || codec.k == KvFormat::kKivi2;
    std::int64_t n = kKvBlockTokens;
    if (!is_kivi && random_.below(2) == 0) n = 1 + random_.below(32);
    KvBlock block;
    block.codec = codec;
    const bool short_raw = codec == KvCodec{} && (index == 0 || random_.below(2) == 0);
    if (short_raw) n = 1 + random_.below(9);
    if (short_raw) block.capacity = static_cast<std::uint8_t>((n + 3) / 4 * 4);
    const bool evicted = random_.below(2) == 1;
    std::vector<std::int64_t> positions;
    next_position_ += random_.below(3);
    block.first_position = static_cast<std::int32_t>(next_position_);
    for (std::int64_t t = 0; t < n; ++t) {
      positions.push_back(next_position_);
      next_position_ += evicted ? 1 + random_.below(options_.max_gap) : 1;
    }
    if (evicted) {
      block.positions = index_list(positions, context_.wide_positions);
      block.first_position = -1;  // not used
    }
    block.end = static_cast<std::uint8_t>(n);
    if (random_.below(4) == 0) block.first = static_cast<std::uint8_t>(random_.below(n));
    std::vector<float> keys;
    std::vector<float> values;
    std::vector<std::int64_t> ids;
    for (std::int64_t t = 0; t < n; ++t) ids.push_back(random_.below(kVocabulary));
    block.k = encode(codec.k, KvSide::kKey, block, n, ids, keys);
    block.v = encode(codec.v, KvSide::kValue, block, n, ids, values);
    for (std::int64_t t = block.first; t < n; ++t) {
      const float* k = keys.data() + t * options_.head_dim;
      const float* v = values.data() + t * options_.head_dim;
      positions_.push_back(positions[static_cast<std::size_t>(t)]);
      values_.insert(values_.end(), v, v + options_.head_dim);
      std::vector<double> key(k, k + options_.head_dim);
      if (is_pre_rope(codec.k)) rotate(key, positions_.back(), block, t);
      keys_.insert(keys_.end(), key.begin(), key.end());
    }
    blocks_.push_back(block);
  }

  // Angles as the kernels take them: the table's, or the first token's plus the step's.
  void rotate(std::vector<double>& key, std::int64_t position, const KvBlock& block,
              std::int64_t step) const {
    const int half = rope_.rotary_dim() / 2;
    for (int i = 0; i < half; ++i) {
      double c = double{rope_.cos(position)[i]};
      double s = double{rope_.sin(position)[i]};
      if (block.positions == nullptr) {
        const double base_cos = double{rope_.cos(block.first_position)[i]};
        const double base_sin = double{rope_.sin(block.first_position)[i]};
        const double step_cos = double{rope_.step_cos()[i * 32 + step]};
        const double step_sin = double{rope_.step_sin()[i * 32 + step]};
        // Both are the same angle up to the rounding of float(position) * frequency.
        const double rounding = static_cast<double>(position) * 0x1p-22 + 1e-6;
        EXPECT_NEAR(base_cos * step_cos - base_sin * step_sin, c, rounding);
        EXPECT_NEAR(base_sin * step_cos + base_cos * step_sin, s, rounding);
        c = base_cos * step_cos - base_sin * step_sin;
        s = base_sin * step_cos + base_cos * step_sin;
      }
      const double a = key[static_cast<std::size_t>(i)];
      const double b = key[static_cast<std::size_t>(i + half)];
      key[static_cast<std::size_t>(i)] = a * c - b * s;
      key[static_cast<std::size_t>(i + half)] = b * c + a * s;
    }
  }

  KvPieces encode(KvFormat format, KvSide side, const KvBlock& block, std::int64_t n,
                  const std::vector<std::int64_t>& ids, std::vector<float>& decoded) {
    const std::int64_t d = options_.head_dim;
    const bool is_key = side == KvSide::kKey;
    decoded.resize(static_cast<std::size_t>(n * d));
    const Rows out{decoded.data(), n, d};
    if (format == KvFormat::kToken) {
      const std::uint16_t* table = is_key ? context_.k_tokens : context_.v_tokens;
      for (std::int64_t t = 0; t < n; ++t) {
        const std::int64_t id = ids[static_cast<std::size_t>(t)];
        for (std::int64_t i = 0; i < d; ++i) {
          out.row(t)[i] = f16_to_f32(table[id * context_.token_stride + i]);
        }
      }
      if (!is_key) return {};
      return {index_list(ids, context_.wide_ids), nullptr};
    }
    const KvSideBytes sizes =
        kv_side_bytes(format, side, options_.head_dim, options_.dtype, block.capacity);
    if (format == KvFormat::kCodebook) return encode_codebook(is_key, n, out);
    std::byte* codes = bytes(sizes.codes, std::byte{0xff});
    std::byte* scales = bytes(sizes.scales, std::byte{0xff});
    std::vector<float> x = random_.normals(n * d);
    // Values off centre, as they are in models.
    for (float& value : x) value += is_key ? 0.5F : -0.5F;
    const ConstRows rows{x.data(), n, d};
    if (format == KvFormat::kRaw) {
      kv_write_raw(side, rows, block.capacity, layout_, codes);
      for (std::size_t i = 0; i < x.size(); ++i) decoded[i] = rounded_to(x[i], options_.dtype);
      return {codes, nullptr};
    }
    const std::vector<std::uint16_t>& mean = is_key ? k_mean_ : v_mean_;
    kv_encode(format, side, rows, mean, codes, scales);
    kv_decode(format, side, {codes, scales}, mean, out);
    return {codes, scales};
  }

  KvPieces encode_codebook(bool is_key, std::int64_t n, Rows out) {
    const Codebook& book = books_[is_key ? 0 : 1];
    CodebookRefs refs;
    for (std::int64_t t = 0; t < n; ++t) {
      refs.entry.push_back(static_cast<std::uint16_t>(random_.below(book.n_entries())));
      refs.magnitude.push_back(f32_to_f16(5.0F + random_.normal()));
    }
    codebook_decode(book, refs, out);
    std::byte* codes = bytes(64, std::byte{0xff});
    std::byte* scales = bytes(64);
    std::memcpy(codes, refs.entry.data(), static_cast<std::size_t>(n) * 2);
    std::memcpy(scales, refs.magnitude.data(), static_cast<std::size_t>(n) * 2);
    return {codes, scales};
  }

  // Pages begin at any position past the blocks; NaN lies in what is not visible.
  void make_tail(std::int64_t n_context) {
    CHECK(next_position_ <= options_.max_tail_first, "the blocks' tokens precede the first query");
    const std::int64_t room = options_.max_tail_first - next_position_;
    tail_origin_ = options_.max_tail_first - random_.below(std::min<std::int64_t>(room, 80) + 1);
    tail_first_ =
        tail_origin_ +
        random_.below(std::min<std::int64_t>(options_.max_tail_first - tail_origin_, 40) + 1);
    const std::int64_t n_pages = (n_context - tail_origin_ + 31) / 32;
    std::vector<std::byte*> writable;
    for (std::int64_t i = 0; i < n_pages; ++i) {
      writable.push_back(bytes(layout_.page_bytes(), std::byte{0xff}));
      pages_.push_back(writable.back());
    }
    const std::int64_t n = n_context - tail_first_;
    const std::int64_t d = options_.head_dim;
    const std::vector<float> k = random_.normals(n * d);
    const std::vector<float> v = random_.normals(n * d);
    const KvWritableHeadPages head{writable.data(), tail_origin_};
    const std::vector<KvAppendSequence> append = {{0, n, tail_first_, &head}};
    kv_append(*make_context_of_one(), {k.data(), n, d}, {v.data(), n, d}, append, 1, layout_);
    for (std::int64_t t = 0; t < n; ++t) {
      positions_.push_back(tail_first_ + t);
      for (std::int64_t i = 0; i < d; ++i) {
        const auto at = static_cast<std::size_t>(t * d + i);
        keys_.push_back(double{rounded_to(k[at], options_.dtype)});
        values_.push_back(double{rounded_to(v[at], options_.dtype)});
      }
    }
  }
  static std::unique_ptr<CpuContext> make_context_of_one() {
    return kernels::make_context(1, CpuIsa::kPortable);
  }

  Random& random_;
  const RopeTable& rope_;
  HeadOptions options_;
  KvPageLayout layout_;
  std::deque<AlignedBytes> storage_;
  KvHeadContext context_;
  std::vector<std::uint16_t> k_mean_, v_mean_, k_table_, v_table_;
  std::array<Codebook, 2> books_;
  std::array<std::vector<const std::byte*>, 2> chunks_;
  std::vector<KvBlock> blocks_;
  std::vector<const std::byte*> pages_;
  std::int64_t next_position_ = 0;
  std::int64_t tail_origin_ = 0;
  std::int64_t tail_first_ = 0;
  std::vector<std::int64_t> positions_;
  std::vector<double> keys_;
  std::vector<double> values_;
};

}  // namespace spindle::kernels
