#pragma once
// A made-up model whose keys and values are functions of (layer, KV head, token id), and a reader
// that decodes everything a head holds. What was put in and what comes out are then comparable
// token by token, whatever the head's codec.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kv_compact.h"
#include "kernels/kv_quant.h"
#include "kvstore/head_cache.h"
#include "kvstore/kv_store.h"

namespace spindle::kvstore::testing {

inline float f16_value(float x) { return f16_to_f32(f32_to_f16(x)); }

inline const CpuContext& cpu() {
  static const std::unique_ptr<CpuContext> context = *CpuContext::create({});
  return *context;
}

class FakeKv {
 public:
  FakeKv(int n_layers, int n_kv_heads, int head_dim, int vocab, std::int64_t max_positions,
         unsigned seed)
      : n_layers_(n_layers),
        n_kv_heads_(n_kv_heads),
        head_dim_(head_dim),
        vocab_(vocab),
        rope_(make_rope(head_dim, max_positions)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0F, 1.0F);
    const auto n = static_cast<std::size_t>(n_layers * vocab * n_kv_heads * head_dim);
    for (std::vector<std::uint16_t>* table : {&k_, &v_}) {
      table->resize(n);
      // Not centred, as real keys and values are not.
      for (std::uint16_t& value : *table) value = f32_to_f16(normal(random) + 0.25F);
    }
  }

  const kernels::RopeTable& rope() const { return rope_; }
  int vocab() const { return vocab_; }
  // Layer 0's, [vocab, n_kv_heads, head_dim].
  const std::uint16_t* k_tokens() const { return k_.data(); }
  const std::uint16_t* v_tokens() const { return v_.data(); }

  std::vector<float> k_before_rope(int layer, int head, std::int32_t token) const {
    return row(k_, layer, head, token);
  }
  std::vector<float> v(int layer, int head, std::int32_t token) const {
    return row(v_, layer, head, token);
  }
  std::vector<float> k(int layer, int head, std::int32_t token, std::int32_t position) const {
    std::vector<float> values = row(k_, layer, head, token);
    const std::int32_t positions[] = {position};
    kernels::rope(cpu(), rope_, positions, head_dim_, Rows(values.data(), 1, head_dim_),
                  Rows(nullptr, 1, 0));
    for (float& value : values) value = f16_value(value);
    return values;
  }

  // Rows of one layer's KV heads for tokens at consecutive positions, as the model would append.
  void append(int layer, std::span<const std::int32_t> tokens, std::int64_t first_position,
              std::span<const kernels::KvWritableHeadPages> heads,
              const kernels::KvPageLayout& layout) const {
    const auto n = static_cast<std::int64_t>(tokens.size());
    const std::int64_t width = std::int64_t{n_kv_heads_} * head_dim_;
    std::vector<float> keys;
    std::vector<float> values;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int32_t token = tokens[static_cast<std::size_t>(i)];
      for (int head = 0; head < n_kv_heads_; ++head) {
        const auto key = k(layer, head, token, static_cast<std::int32_t>(first_position + i));
        const auto value = v(layer, head, token);
        keys.insert(keys.end(), key.begin(), key.end());
        values.insert(values.end(), value.begin(), value.end());
      }
    }
    const kernels::KvAppendSequence sequence{0, n, first_position, heads.data()};
    kernels::kv_append(cpu(), ConstRows(keys.data(), n, width), ConstRows(values.data(), n, width),
                       {&sequence, 1}, n_kv_heads_, layout);
  }

 private:
  static kernels::RopeTable make_rope(int head_dim, std::int64_t max_positions) {
    std::vector<float> inv_freq;
    for (int i = 0; i < head_dim / 2; ++i) {
      inv_freq.push_back(
          std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(head_dim)));
    }
    return *kernels::RopeTable::create(inv_freq, max_positions);
  }
  std::vector<float> row(const std::vector<std::uint16_t>& table, int layer, int head,
                         std::int32_t token) const {
    const auto first = ((static_cast<std::size_t>(layer) * static_cast<std::size_t>(vocab_) +
                         static_cast<std::size_t>(token)) *
                            static_cast<std::size_t>(n_kv_heads_) +
                        static_cast<std::size_t>(head)) *
                       static_cast<std::size_t>(head_dim_);
    std::vector<float> values;
    for (std::size_t c = 0; c < static_cast<std::size_t>(head_dim_); ++c) {
      values.push_back(f16_to_f32(table[first + c]));
    }
    return values;
  }

  int n_layers_;
  int n_kv_heads_;
  int head_dim_;
  int vocab_;
  kernels::RopeTable rope_;
  std::vector<std::uint16_t> k_;  // before RoPE, [n_layers, vocab, n_kv_heads, head_dim]
  std::vector<std::uint16_t> v_;
};

// A token that a head holds.
struct StoredToken {
  std::int64_t position = 0;
  bool in_tail = false;
  kernels::KvCodec codec;  // of its block
  std::vector<float> k;    // before RoPE when the format is
  std::vector<float> v;
  // What is coded is the difference from it; empty: the vector itself.
  std::vector<float> k_mean = {};
  std::vector<float> v_mean = {};
};

inline void decode_side(kernels::KvFormat format, kernels::KvSide side,
                        const kernels::KvBlock& block, const kernels::KvHeadContext& context,
                        const kernels::KvPageLayout& layout, Rows out) {
  using kernels::KvFormat;
  using kernels::KvSide;
  const bool is_key = side == KvSide::kKey;
  const kernels::KvPieces pieces = is_key ? block.k : block.v;
  const std::int64_t d = layout.head_dim;
  const auto half = [](const std::byte* from, std::int64_t i) {
    std::uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    return bits;
  };
  for (std::int64_t t = 0; t < out.n_rows; ++t) {
    for (std::int64_t c = 0; c < d; ++c) {
      float& value = out.row(t)[c];
      if (format == KvFormat::kRaw) {
        value = f16_to_f32(half(pieces.codes, is_key ? c * block.capacity + t : t * d + c));
      } else if (format == KvFormat::kCodebook) {
        const std::uint16_t entry = half(pieces.codes, t);
        const std::byte* chunk =
            (is_key ? context.k_entries
                    : context.v_entries)[entry / kernels::kCodebookChunkEntries];
        value = f16_to_f32(half(chunk, entry % kernels::kCodebookChunkEntries * d + c)) *
                f16_to_f32(half(pieces.scales, t));
      } else if (format == KvFormat::kToken) {
        std::uint32_t id = 0;
        std::memcpy(&id, block.k.codes + t * (context.wide_ids ? 4 : 2), context.wide_ids ? 4 : 2);
        value = f16_to_f32(
            (is_key ? context.k_tokens : context.v_tokens)[id * context.token_stride + c]);
      }
    }
  }
  if (format == KvFormat::kRaw || format == KvFormat::kCodebook || format == KvFormat::kToken) {
    return;
  }
  const std::uint16_t* mean = is_key ? context.k_mean : context.v_mean;
  kernels::kv_decode(format, side, pieces,
                     mean == nullptr ? std::span<const std::uint16_t>()
                                     : std::span(mean, static_cast<std::size_t>(d)),
                     out);
}

// That a format's codes are relative to.
inline std::vector<float> mean_of(kernels::KvFormat format, const std::uint16_t* mean,
                                  std::int64_t d) {
  if (!kernels::is_lloyd(format) || mean == nullptr) return {};
  std::vector<float> values(static_cast<std::size_t>(d));
  std::transform(mean, mean + d, values.begin(), f16_to_f32);
  return values;
}

// Everything a head holds, in the order it is stored in.
inline std::vector<StoredToken> read_head(const HeadCache& head, std::int64_t n_tokens,
                                          const kernels::KvPageLayout& layout) {
  std::vector<StoredToken> tokens;
  const std::int64_t d = layout.head_dim;
  for (const kernels::KvBlock& block : head.blocks) {
    std::vector<float> k(static_cast<std::size_t>(block.end * d));
    std::vector<float> v(k.size());
    decode_side(block.codec.k, kernels::KvSide::kKey, block, head.context, layout,
                Rows(k.data(), block.end, d));
    decode_side(block.codec.v, kernels::KvSide::kValue, block, head.context, layout,
                Rows(v.data(), block.end, d));
    for (int t = block.first; t < block.end; ++t) {
      std::uint32_t position = static_cast<std::uint32_t>(block.first_position + t);
      if (block.positions != nullptr) {
        position = 0;
        const int width = head.context.wide_positions ? 4 : 2;
        std::memcpy(&position, block.positions + t * width, static_cast<std::size_t>(width));
      }
      const auto at = static_cast<std::ptrdiff_t>(t * d);
      tokens.push_back({position,
                        false,
                        block.codec,
                        {k.begin() + at, k.begin() + at + d},
                        {v.begin() + at, v.begin() + at + d},
                        mean_of(block.codec.k, head.context.k_mean, d),
                        mean_of(block.codec.v, head.context.v_mean, d)});
    }
  }
  for (std::int64_t p = head.tail_first; p < n_tokens; ++p) {
    StoredToken token{p, true, {}, {}, {}};
    token.k.resize(static_cast<std::size_t>(d));
    token.v.resize(static_cast<std::size_t>(d));
    const std::int32_t positions[] = {static_cast<std::int32_t>(p)};
    kernels::kv_gather(cpu(), head.tail_data.data(), head.tail_origin, positions, layout,
                       Rows(token.k.data(), 1, d), Rows(token.v.data(), 1, d));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

inline double relative_error(const std::vector<float>& got, const std::vector<float>& wanted) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    norm += wanted[i] * wanted[i];
  }
  return std::sqrt(error / norm);
}

// What a format loses of a vector at most on average, single ones by half more; another token's
// vector is off by about 1.4.
inline double error_limit(kernels::KvFormat format, kernels::KvSide side) {
  using kernels::KvFormat;
  switch (format) {
    case KvFormat::kRaw:
    case KvFormat::kToken:
      return 0;
    case KvFormat::kInt4:
    case KvFormat::kKivi4:
    case KvFormat::kLloyd4:
      return 0.2;
    case KvFormat::kLloyd3:
      return 0.35;
    case KvFormat::kLloyd2:
      return 0.55;
    case KvFormat::kKivi2:
    case KvFormat::kLloyd1:
      return 0.9;
    case KvFormat::kCodebook:
      return side == kernels::KvSide::kKey ? 0.22 : 0.34;
  }
  return 0;
}

// The same of what is coded, on average. Lloyd codes of 1 to 4 bits lose 0.62, 0.33, 0.17 and 0.09
// of it; the worst averages of 16 vectors and more, of some thousands, were 0.66, 0.37, 0.19 and
// 0.12.
inline double coded_error_limit(kernels::KvFormat format, kernels::KvSide side) {
  using kernels::KvFormat;
  switch (format) {
    case KvFormat::kLloyd1:
      return 0.72;
    case KvFormat::kLloyd2:
      return 0.45;
    case KvFormat::kLloyd3:
      return 0.27;
    case KvFormat::kLloyd4:
      return 0.15;
    default:
      return error_limit(format, side);
  }
}
// The size of what is coded, of the vector's: a mean that was frozen at one token may be farther
// from the next than no mean.
inline double coded_share(const std::vector<float>& vector, const std::vector<float>& mean) {
  return mean.empty() ? 1.0 : std::max(relative_error(mean, vector), 0.01);
}

// Every token that a head holds is the one that was put in at its position.
inline void expect_content(const std::vector<StoredToken>& stored,
                           std::span<const std::int32_t> tokens, const FakeKv& model, int layer,
                           int head) {
  std::int64_t before = -1;
  std::map<std::pair<kernels::KvFormat, kernels::KvSide>, std::pair<double, int>> sums;
  for (const StoredToken& token : stored) {
    ASSERT_GT(token.position, before) << "positions ascend";
    ASSERT_LT(token.position, static_cast<std::int64_t>(tokens.size()));
    before = token.position;
    const std::int32_t id = tokens[static_cast<std::size_t>(token.position)];
    const bool pre = !token.in_tail && kernels::is_pre_rope(token.codec.k);
    const std::vector<float> k =
        pre ? model.k_before_rope(layer, head, id)
            : model.k(layer, head, id, static_cast<std::int32_t>(token.position));
    const double errors[] = {relative_error(token.k, k),
                             relative_error(token.v, model.v(layer, head, id))};
    for (const kernels::KvSide side : {kernels::KvSide::kKey, kernels::KvSide::kValue}) {
      const bool is_key = side == kernels::KvSide::kKey;
      const kernels::KvFormat format = is_key ? token.codec.k : token.codec.v;
      const double error = errors[is_key ? 0 : 1];
      ASSERT_LE(error, 1.5 * error_limit(format, side))
          << (is_key ? "key" : "value") << " at " << token.position << " of head " << layer << "."
          << head;
      auto& [sum, n] = sums[{format, side}];
      sum += error / coded_share(is_key ? k : model.v(layer, head, id),
                                 is_key ? token.k_mean : token.v_mean);
      ++n;
    }
  }
  for (const auto& [kind, sum] : sums) {
    if (sum.second < 16) continue;
    ASSERT_LE(sum.first / sum.second, coded_error_limit(kind.first, kind.second))
        << format_name(kind.first) << " of head " << layer << "." << head;
  }
}

inline std::vector<std::int64_t> positions_of(const std::vector<StoredToken>& stored) {
  std::vector<std::int64_t> positions;
  for (const StoredToken& token : stored) positions.push_back(token.position);
  return positions;
}

inline std::vector<std::int64_t> range(std::int64_t first, std::int64_t end) {
  std::vector<std::int64_t> positions;
  for (std::int64_t p = first; p < end; ++p) positions.push_back(p);
  return positions;
}

inline std::vector<std::int32_t> random_tokens(std::int64_t n, int vocab, std::mt19937& random) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < n; ++i) {
    tokens.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab)));
  }
  return tokens;
}

}  // namespace spindle::kvstore::testing
