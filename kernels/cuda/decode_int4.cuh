#pragma once
// Units of int4: codes go to the tensor cores as f16 subnormals, two operations a pair of codes.
// Scales and minima of K are applied to the scores; those of V to the weights.

#include <cstdint>

#include "kernels/cuda/decode_raw.cuh"

namespace spindle::kernels::device {

// The pair `pair` of a word of 4-bit codes, as f16 subnormals: code * kCodeUnit when the pair is
// even, 16 times that when it is odd.
template <int kPair>
__device__ inline std::uint32_t nibbles(std::uint32_t word) {
  constexpr std::uint32_t kMask = kPair % 2 == 0 ? 0x000f000fU : 0x00f000f0U;
  return (kPair < 2 ? word : word >> 8) & kMask;
}

// f16 numbers [32] of the tokens; the lane's own of its token rows.
__device__ inline float of_key_token(const uint4& halves, int w, const Lane& lane) {
  const std::uint32_t word = w == 0 ? halves.x : w == 1 ? halves.y : w == 2 ? halves.z : halves.w;
  return half_bits_to_float(word >> (lane.g % 2 * 16) & 0xffffU);
}
__device__ inline uint4 load_of_key_tokens(std::uint32_t list, const Lane& lane) {
  return load_shared(list + lane.g / 2 * 16);
}

// Products of 4-bit codes of K with a query tile whose odd pairs are divided by 16, in units of
// kCodeUnit; in two sums, which are shorter chains.
template <int kDim>
__device__ inline void nibble_products(float (&products)[2][2][4], std::uint32_t codes,
                                       std::uint32_t q, const Lane& lane) {
#pragma unroll
  for (int chunk = 0; chunk < kDim / 32; ++chunk) {
    const uint4 word = load_shared(codes + (chunk * 32 + lane.index) * 16);
    const uint4 query = load_query(q, chunk, lane);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const std::uint32_t a = t == 0 ? word.x : word.z;
      const std::uint32_t b = t == 0 ? word.y : word.w;
      mma_f16(products[t][0], nibbles<0>(a), nibbles<0>(b), nibbles<1>(a), nibbles<1>(b), query.x,
              query.y);
      mma_f16(products[t][1], nibbles<2>(a), nibbles<2>(b), nibbles<3>(a), nibbles<3>(b), query.z,
              query.w);
    }
  }
}

// `q` is the query tile in the Hadamard basis, as nibble_products() wants it; `q_sums` [8] its
// sums.
template <int kDim>
__device__ inline void int4_scores(Softmax<kDim>& s, std::uint32_t stage, std::uint32_t q,
                                   const float* q_sums, const Lane& lane) {
  float products[2][2][4] = {};
  nibble_products<kDim>(products, stage, q, lane);
  const uint4 scales = load_of_key_tokens(stage + 16 * kDim, lane);
  const uint4 minima = load_of_key_tokens(stage + 16 * kDim + 64, lane);
  const float sums[2] = {q_sums[2 * lane.q], q_sums[2 * lane.q + 1]};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float scale = of_key_token(scales, w, lane) * kCodeUnitInverse;
    const float minimum = of_key_token(minima, w, lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = w % 2 * 2 + e;
      s.weights[w / 2][at] =
          fmaf(products[w / 2][0][at] + products[w / 2][1][at], scale, minimum * sums[e]);
    }
  }
}

// Adds 4-bit codes times weights, whose odd pairs are divided by 16, in units of kCodeUnit.
__device__ inline void nibble_sums(float (&sums)[4], std::uint32_t a, std::uint32_t b,
                                   const std::uint32_t (&pairs)[4]) {
  mma_f16(sums, nibbles<0>(a), nibbles<0>(b), nibbles<1>(a), nibbles<1>(b), pairs[0], pairs[1]);
  mma_f16(sums, nibbles<2>(a), nibbles<2>(b), nibbles<3>(a), nibbles<3>(b), pairs[2], pairs[3]);
}

// Minima times weights are the same for all channels of the Hadamard basis, so that their error
// would be that of one channel of the plain basis, times sqrt(kDim). So they take the weights as
// rounded to f16, like the codes do, and what the codes' weights lose by rounding again, at the
// middle of the codes.
template <int kDim>
__device__ inline void int4_values(Softmax<kDim>& s, std::uint32_t stage, const Lane& lane) {
  constexpr std::uint32_t kMiddle = 0x47804780U;  // 7.5
  constexpr std::uint32_t kSixteenth = 0x2c002c00U;
  const std::uint32_t of_tokens = stage + 16 * kDim + 16 * lane.q;
  const Words4 scale = words(load_shared(of_tokens));
  const Words4 minimum = words(load_shared(of_tokens + 64));
  std::uint32_t weights[4];
  pack_weights<false>(s.weights, weights);
  std::uint32_t pairs[4] = {weights[0], weights[1], weights[2], weights[3]};
  times_scales(pairs, scale);
  std::uint32_t lost[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    lost[w] = min_f16(fma_f16(weights[w], scale.x[w], negate_f16(pairs[w])), kLargestF16);
  }
#pragma unroll
  for (int w = 0; w < 4; w += 2) {
    mma_f16(s.minima, minimum.x[w], minimum.x[w], minimum.x[w + 1], minimum.x[w + 1], weights[w],
            weights[w + 1]);
    mma_f16(s.minima, kMiddle, kMiddle, kMiddle, kMiddle, lost[w], lost[w + 1]);
  }
  pairs[1] = mul_f16(pairs[1], kSixteenth);
  pairs[3] = mul_f16(pairs[3], kSixteenth);
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const uint4 word = load_shared(stage + (i * 32 + lane.index) * 16);
    nibble_sums(s.values[2 * i], word.x, word.y, pairs);
    nibble_sums(s.values[2 * i + 1], word.z, word.w, pairs);
  }
}

}  // namespace spindle::kernels::device
