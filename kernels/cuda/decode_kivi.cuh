#pragma once
// Units of KIVI: K has a scale and a minimum per channel, which go to the queries; V has them per
// token and 32 channels, which go to the weights. Minima are summed by products with constant rows.

#include <cstdint>

#include "kernels/cuda/decode_levels.cuh"
#include "kernels/cuda/decode_rope.cuh"

namespace spindle::kernels::device {

// Pair p of a word as f16 subnormals: code * kCodeUnit * kivi_weight(p). Words of 2 bits have the
// pairs of two groups, `second` is the other one.
template <int kBits>
__device__ inline std::uint32_t kivi_pair(std::uint32_t word, int p, bool second) {
  if constexpr (kBits == 4) {
    const std::uint32_t mask = p % 2 == 0 ? 0x000f000fU : 0x00f000f0U;
    return (p < 2 ? word : word >> 8) & mask;
  } else {
    return (second ? word >> 8 : word) & (0x00030003U << (2 * p));
  }
}
template <int kBits>
__device__ constexpr float kivi_weight_inverse(int p) {
  if (kBits == 4) return p % 2 == 0 ? 1.0F : 0.0625F;
  return p == 0 ? 1.0F : p == 1 ? 0.25F : p == 2 ? 0.0625F : 0.015625F;
}

template <int kBits, int kDim>
__device__ inline void kivi_scores(Softmax<kDim>& s, std::uint32_t stage, std::uint32_t q,
                                   const Lane& lane) {
  Plane<kBits, kDim> codes;
  codes.load(stage, lane);
  const std::uint32_t steps = stage + 4 * kBits * kDim;
  float products[2][4] = {};
  float minima[4] = {};
#pragma unroll
  for (int chunk = 0; chunk < kDim / 32; ++chunk) {
    const std::uint32_t at = steps + (32 * chunk + 8 * lane.q) * 2;
    const Words4 scale = words(load_shared(at));
    const Words4 minimum = words(load_shared(at + 2 * kDim));
    const Words4 query = words(load_query(q, chunk, lane));
    Words4 scaled;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float weight = kivi_weight_inverse<kBits>(p);
      scaled.x[p] = mul_f16(mul_f16(query.x[p], scale.x[p]), pack<false>(weight, weight));
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int p = 2 * u;
      mma_f16(minima, minimum.x[p], minimum.x[p], minimum.x[p + 1], minimum.x[p + 1], query.x[p],
              query.x[p + 1]);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int first = kBits == 4 ? 4 * chunk + 2 * t : chunk / 2 * 4 + 2 * t;
        const std::uint32_t a = codes.words[first];
        const std::uint32_t b = codes.words[first + 1];
        const bool second = chunk % 2 == 1;
        mma_f16(products[t], kivi_pair<kBits>(a, p, second), kivi_pair<kBits>(b, p, second),
                kivi_pair<kBits>(a, p + 1, second), kivi_pair<kBits>(b, p + 1, second), scaled.x[p],
                scaled.x[p + 1]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    s.weights[i / 4][i % 4] = fmaf(products[i / 4][i % 4], kCodeUnitInverse, minima[i % 2]);
  }
}

template <int kBits, int kDim>
__device__ inline void kivi_values(Softmax<kDim>& s, std::uint32_t stage, const Lane& lane) {
  Plane<kBits, kDim> codes;
  codes.load(stage, lane);
  const std::uint32_t steps = stage + 4 * kBits * kDim;
  constexpr std::uint32_t kOnes = 0x3c003c00U;
#pragma unroll
  for (int group = 0; group < kDim / 32; ++group) {
    const uint4 scales = load_of_key_tokens(steps + 64 * group, lane);
    const uint4 minima = load_of_key_tokens(steps + 2 * kDim + 64 * group, lane);
    std::uint32_t scaled[4];
    std::uint32_t shifted[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float low = s.weights[w / 2][w % 2 * 2];
      const float high = s.weights[w / 2][w % 2 * 2 + 1];
      const float scale = of_key_token(scales, w, lane) * kivi_weight_inverse<kBits>(w);
      const float minimum = of_key_token(minima, w, lane);
      scaled[w] = transpose_8x8(pack<false>(f16_range(low * scale), f16_range(high * scale)));
      shifted[w] = transpose_8x8(pack<false>(f16_range(low * minimum), f16_range(high * minimum)));
    }
    float sums[4] = {};
    mma_f16(sums, kOnes, kOnes, kOnes, kOnes, shifted[0], shifted[1]);
    mma_f16(sums, kOnes, kOnes, kOnes, kOnes, shifted[2], shifted[3]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = 2 * group + i;
      const std::uint32_t a = kBits == 4 ? codes.words[2 * m] : codes.words[m];
      const std::uint32_t b = kBits == 4 ? codes.words[2 * m + 1] : codes.words[m] >> 8;
      float products[4] = {};
#pragma unroll
      for (int p = 0; p < 4; p += 2) {
        mma_f16(products, kivi_pair<kBits>(a, p, false), kivi_pair<kBits>(b, p, false),
                kivi_pair<kBits>(a, p + 1, false), kivi_pair<kBits>(b, p + 1, false), scaled[p],
                scaled[p + 1]);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        s.values[m][r] += fmaf(products[r], kCodeUnitInverse, sums[r % 2]);
      }
    }
  }
}

}  // namespace spindle::kernels::device
