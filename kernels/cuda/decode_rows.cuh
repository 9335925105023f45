#pragma once
// Units whose tokens refer to rows of f16: codebook entries with magnitudes, and token ids. Rows
// are gathered into the stages: K as pages lie, chunk `part` and its partner of the rotation; V as
// rows of 64 channels, whose 16-byte pieces change places so that transposing loads meet all banks.

#include <cstdint>

#include "kernels/cuda/decode_rope.cuh"

namespace spindle::kernels::device {

template <int kPart, AngleKind kKind, int kDim>
__device__ inline void row_scores_of_part(Softmax<kDim>& s, std::uint32_t stage, std::uint32_t q,
                                          const BlockAngles& block, const DecodeCall& call,
                                          const Lane& lane) {
  const std::uint32_t row = stage + lane.key_token() * 64 + lane.q * 16;
  const QueryPair<kDim> query(q, kPart, block.base, lane);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    Words4 low[2];
    Words4 high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Words4 a = words(load_shared(row + t * 256 + h * 128));
      const Words4 b = words(load_shared(row + 2048 + t * 256 + h * 128));
      const Angles angles = token_angles<kDim, kKind>(block, 2 * t + h, kPart, call, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Twice cos and sin, with the steps' factor.
        const std::uint32_t cos = add_f16(angles.plus.x[i], angles.less.x[i]);
        const std::uint32_t sin = sub_f16(angles.plus.x[i], angles.less.x[i]);
        low[h].x[i] = fma_f16(negate_f16(b.x[i]), sin, mul_f16(a.x[i], cos));
        high[h].x[i] = fma_f16(a.x[i], sin, mul_f16(b.x[i], cos));
      }
    }
    const auto& q_low = query.low.x;
    const auto& q_high = query.high.x;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int i = 2 * u;
      mma_f16(s.weights[t], low[0].x[i], low[1].x[i], low[0].x[i + 1], low[1].x[i + 1], q_low[i],
              q_low[i + 1]);
      mma_f16(s.weights[t], high[0].x[i], high[1].x[i], high[0].x[i + 1], high[1].x[i + 1],
              q_high[i], q_high[i + 1]);
    }
  }
}

// `magnitudes` is the shared address of f16 [32], or 0: all 1.
template <AngleKind kKind, int kDim>
__device__ inline void row_scores(Softmax<kDim>& s, std::uint32_t stage, int part, std::uint32_t q,
                                  const BlockAngles& block, bool has_magnitudes,
                                  const DecodeCall& call, const Lane& lane) {
  if (part == 0) {
    s.clear_weights();
    row_scores_of_part<0, kKind>(s, stage, q, block, call, lane);
  }
  if constexpr (kDim == 128) {
    if (part == 1) row_scores_of_part<1, kKind>(s, stage, q, block, call, lane);
  }
  if (part != kDim / 64 - 1) return;
  const uint4 magnitudes = load_of_key_tokens(stage + kScalesOffset<kDim>, lane);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float factor = 0.5F / rest_norm<kDim>();
    if (has_magnitudes) factor *= of_key_token(magnitudes, w, lane);
    s.weights[w / 2][w % 2 * 2] *= factor;
    s.weights[w / 2][w % 2 * 2 + 1] *= factor;
  }
}

template <int kPart, int kDim>
__device__ inline void row_values_of_part(Softmax<kDim>& s, std::uint32_t stage,
                                          const std::uint32_t (&pairs)[4], const Lane& lane) {
  // Row r of the matrix (x, h) that the lane gives the address of.
  const int r = lane.index % 8;
  const int x = lane.index / 8 % 2;
  const int h = lane.index / 16;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int token = 8 * (r / 2) + 4 * t + 2 * h + r % 2;
    const std::uint32_t row = stage + token * 128;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      std::uint32_t v[4];
      load_transposed(v, row + (((2 * m + x) ^ row_swizzle(token)) * 16));
      mma_f16(s.values[4 * kPart + m], v[0], v[1], v[2], v[3], pairs[2 * t], pairs[2 * t + 1]);
    }
  }
}

template <int kDim>
__device__ inline void row_values(Softmax<kDim>& s, std::uint32_t stage, int part,
                                  bool has_magnitudes, const Lane& lane) {
  const uint4 magnitudes = load_of_key_tokens(stage + kScalesOffset<kDim>, lane);
  std::uint32_t pairs[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float magnitude = has_magnitudes ? of_key_token(magnitudes, w, lane) : 1.0F;
    const float low = s.weights[w / 2][w % 2 * 2] * magnitude;
    const float high = s.weights[w / 2][w % 2 * 2 + 1] * magnitude;
    pairs[w] = transpose_8x8(pack<false>(f16_range(low), f16_range(high)));
  }
  if (part == 0) row_values_of_part<0, kDim>(s, stage, pairs, lane);
  if constexpr (kDim == 128) {
    if (part == 1) row_values_of_part<1, kDim>(s, stage, pairs, lane);
  }
}

}  // namespace spindle::kernels::device
