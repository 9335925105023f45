#pragma once
// Units whose tokens refer to rows of f16: codebook entries with magnitudes, and token ids. Rows
// are gathered into the stages: K as pages lie, chunk `part` and its partner of the rotation; V as
// rows of 64 channels, whose 16-byte pieces change places so that transposing loads meet all banks.

#include <cstdint>

#include "kernels/cuda/decode_rope.cuh"

namespace spindle::kernels::device {

// cos and sin of a token's way from the base, for the channels of a chunk; twice, and with the
// steps' factor, where steps are not plain.
struct Turn {
  Words4 cos;
  Words4 sin;
};

template <int kDim, AngleKind kKind, bool kPlainSteps>
__device__ inline Turn token_turn(const BlockAngles& block, int w, int chunk,
                                  const DecodeCall& call, const Lane& lane) {
  Turn turn;
  if constexpr (!kPlainSteps) {
    const Angles angles = token_angles<kDim, kKind>(block, w, chunk, call, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      turn.cos.x[i] = add_f16(angles.plus.x[i], angles.less.x[i]);
      turn.sin.x[i] = sub_f16(angles.plus.x[i], angles.less.x[i]);
    }
  } else if constexpr (kKind != AngleKind::kAny) {
    const Angles angles = token_angles<kDim, kKind>(block, w, chunk, call, lane);
    turn = {angles.less, angles.plus};
  } else if (block.kind == AngleKind::kTable) {
    const std::int64_t row = std::int64_t{block.at[w]} * (kDim / 2) + 32 * chunk + 8 * lane.q;
    const float* cos = call.rope_cos + row;
    const float* sin = call.rope_sin + row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      turn.cos.x[i] = pack<false>(cos[2 * i], cos[2 * i + 1]);
      turn.sin.x[i] = pack<false>(sin[2 * i], sin[2 * i + 1]);
    }
  } else {
    using Table = AngleTable<kDim>;
    const auto load = [&](std::uint32_t table, int row, int number) {
      return words(load_shared(table + Table::offset(row, chunk, number, lane.q)));
    };
    const int step = block.at[w] % kSteps;
    const int stride = block.at[w] / kSteps;
    const Words4 step_cos = load(block.steps, step, 0);
    const Words4 step_sin = load(block.steps, step, 1);
    const Words4 cos = load(block.strides, stride, 0);
    const Words4 sin = load(block.strides, stride, 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      turn.cos.x[i] =
          fma_f16(negate_f16(step_sin.x[i]), sin.x[i], mul_f16(step_cos.x[i], cos.x[i]));
      turn.sin.x[i] = fma_f16(step_sin.x[i], cos.x[i], mul_f16(step_cos.x[i], sin.x[i]));
    }
  }
  return turn;
}

// Adds the product with the chunks kPart and kPart + kDim / 64 of K to the scores.
template <int kPart, AngleKind kKind, bool kPlainSteps, int kDim>
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
      const Turn turn = token_turn<kDim, kKind, kPlainSteps>(block, 2 * t + h, kPart, call, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[h].x[i] = fma_f16(negate_f16(b.x[i]), turn.sin.x[i], mul_f16(a.x[i], turn.cos.x[i]));
        high[h].x[i] = fma_f16(a.x[i], turn.sin.x[i], mul_f16(b.x[i], turn.cos.x[i]));
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

// The products become scores. `magnitudes` is the shared address of f16 [32], or 0: all 1.
template <bool kPlainSteps, int kDim>
__device__ inline void scale_row_scores(Softmax<kDim>& s, std::uint32_t magnitudes,
                                        const Lane& lane) {
  if (kPlainSteps && magnitudes == 0) return;
  uint4 of_tokens = {};
  if (magnitudes != 0) of_tokens = load_of_key_tokens(magnitudes, lane);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float factor = kPlainSteps ? 1.0F : 0.5F / rest_norm<kDim>();
    if (magnitudes != 0) factor *= of_key_token(of_tokens, w, lane);
    s.weights[w / 2][w % 2 * 2] *= factor;
    s.weights[w / 2][w % 2 * 2 + 1] *= factor;
  }
}

// A stage of the pipe.
template <AngleKind kKind, int kDim>
__device__ inline void row_scores(Softmax<kDim>& s, std::uint32_t stage, int part, std::uint32_t q,
                                  const BlockAngles& block, bool has_magnitudes,
                                  const DecodeCall& call, const Lane& lane) {
  if (part == 0) {
    s.clear_weights();
    row_scores_of_part<0, kKind, false>(s, stage, q, block, call, lane);
  }
  if constexpr (kDim == 128) {
    if (part == 1) row_scores_of_part<1, kKind, false>(s, stage, q, block, call, lane);
  }
  if (part != kDim / 64 - 1) return;
  scale_row_scores<false>(s, has_magnitudes ? stage + kScalesOffset<kDim> : 0, lane);
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

// B operands of the product with V: weights times magnitudes, which are at a shared address, or 0:
// all 1.
__device__ inline void pack_row_weights(const float (&weights)[2][4], std::uint32_t magnitudes,
                                        std::uint32_t (&pairs)[4], const Lane& lane) {
  uint4 of_tokens = {};
  if (magnitudes != 0) of_tokens = load_of_key_tokens(magnitudes, lane);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float magnitude = magnitudes != 0 ? of_key_token(of_tokens, w, lane) : 1.0F;
    const float low = weights[w / 2][w % 2 * 2] * magnitude;
    const float high = weights[w / 2][w % 2 * 2 + 1] * magnitude;
    pairs[w] = transpose_8x8(pack<false>(f16_range(low), f16_range(high)));
  }
}

// A stage of the pipe.
template <int kDim>
__device__ inline void row_values(Softmax<kDim>& s, std::uint32_t stage, int part,
                                  bool has_magnitudes, const Lane& lane) {
  std::uint32_t pairs[4];
  pack_row_weights(s.weights, has_magnitudes ? stage + kScalesOffset<kDim> : 0, pairs, lane);
  if (part == 0) row_values_of_part<0, kDim>(s, stage, pairs, lane);
  if constexpr (kDim == 128) {
    if (part == 1) row_values_of_part<1, kDim>(s, stage, pairs, lane);
  }
}

}  // namespace spindle::kernels::device
