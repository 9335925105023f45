#pragma once
// Units of 16-bit elements: scores and values straight from the stages.

#include <cstdint>

#include "kernels/cuda/decode_softmax.cuh"

namespace spindle::kernels::device {

// 16-byte fragment of the query tile: head g, channels 32 chunk + 8 q + 0..7.
__device__ inline uint4 load_query(std::uint32_t q, int chunk, const Lane& lane) {
  return load_shared(q + (chunk * 32 + lane.index) * 16);
}
__device__ inline std::uint32_t f16_to_bf16(std::uint32_t pair) {
  const float2 x = unpack_f16(pair);
  return pack<true>(x.x, x.y);
}

// Adds the product with channels [64 part, 64 part + 64) of K to the scores.
template <int kDim, bool kBf16>
__device__ inline void raw_scores(Softmax<kDim>& s, std::uint32_t stage, int part, std::uint32_t q,
                                  const Lane& lane) {
  if (part == 0) s.clear_weights();
  const std::uint32_t row = stage + lane.key_token() * 64 + lane.q * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint4 query = load_query(q, 2 * part + i, lane);
    if constexpr (kBf16) {
      query = {f16_to_bf16(query.x), f16_to_bf16(query.y), f16_to_bf16(query.z),
               f16_to_bf16(query.w)};
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint4 a = load_shared(row + i * 2048 + t * 256);
      const uint4 b = load_shared(row + i * 2048 + t * 256 + 128);
      float(&scores)[4] = s.weights[t];
      mma<kBf16>(scores, a.x, b.x, a.y, b.y, query.x, query.y);
      mma<kBf16>(scores, a.z, b.z, a.w, b.w, query.z, query.w);
    }
  }
}

// Zeros in the words of tokens that are not visible: their elements may be anything, also NaN.
__device__ inline uint4 token_mask(const Stage& stage, const Lane& lane) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int token = 8 * lane.q + 2 * w;
    words[w] = (token >= stage.first() && token < stage.end() ? 0xffffU : 0U) |
               (token + 1 >= stage.first() && token + 1 < stage.end() ? 0xffff0000U : 0U);
  }
  return {words[0], words[1], words[2], words[3]};
}
__device__ inline uint4 masked(uint4 x, uint4 mask) {
  return {x.x & mask.x, x.y & mask.y, x.z & mask.z, x.w & mask.w};
}

template <int kPart, int kDim, bool kBf16>
__device__ inline void raw_values_of_part(Softmax<kDim>& s, std::uint32_t data, const Stage& stage,
                                          const std::uint32_t (&pairs)[4], const Lane& lane) {
  const bool is_partial = stage.is_partial();
  const uint4 mask = token_mask(stage, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 a = load_shared(data + (2 * i * 32 + lane.index) * 16);
    uint4 b = load_shared(data + ((2 * i + 1) * 32 + lane.index) * 16);
    if (is_partial) {
      a = masked(a, mask);
      b = masked(b, mask);
    }
    float(&sums)[4] = s.values[4 * kPart + i];
    mma<kBf16>(sums, a.x, b.x, a.y, b.y, pairs[0], pairs[1]);
    mma<kBf16>(sums, a.z, b.z, a.w, b.w, pairs[2], pairs[3]);
  }
}

template <int kDim, bool kBf16>
__device__ inline void raw_values(Softmax<kDim>& s, std::uint32_t data, const Stage& stage,
                                  const Lane& lane) {
  std::uint32_t pairs[4];
  pack_weights<kBf16>(s.weights, pairs);
  if constexpr (kDim == 64) {
    raw_values_of_part<0, kDim, kBf16>(s, data, stage, pairs, lane);
  } else if (stage.part() == 0) {
    raw_values_of_part<0, kDim, kBf16>(s, data, stage, pairs, lane);
  } else {
    raw_values_of_part<1, kDim, kBf16>(s, data, stage, pairs, lane);
  }
}

}  // namespace spindle::kernels::device
