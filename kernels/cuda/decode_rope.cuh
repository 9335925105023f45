#pragma once
// Keys before RoPE. The queries are turned back by a block's base position, and the keys by the
// small steps from there: angles of the steps 0..31, or 0..63, and of the strides 0, 32 .. 992 lie
// in shared memory, in f16. Positions farther from the base take their rows of the full table.

#include <cstdint>

#include "kernels/cuda/decode_int4.cuh"

namespace spindle::kernels::device {

inline constexpr int kSteps = 32;
inline constexpr int kMaxStep = kSteps * kSteps;

// Angles [kRows][kDim / 64 chunks][2 numbers][4 quads][8 channels], f16. Strides hold cos and sin;
// steps too where there are rows only, else cos - sin and cos + sin, times a factor for the
// Hadamard transform. The two numbers change places in odd rows, so that neighbouring rows lie in
// different banks.
template <int kDim, int kRows = kSteps>
struct alignas(128) AngleTable {
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kChunkBytes = 128;
  std::byte rows[kRows * kRowBytes];

  __device__ static int offset(int row, int chunk, int number, int quad) {
    return row * kRowBytes + chunk * kChunkBytes + (number ^ (row & 1)) * 64 + quad * 16;
  }
};

// The butterflies that are left when the tensor cores have done four stages.
template <int kDim>
__device__ constexpr float rest_norm() {
  return kDim == 64 ? 0.5F : 0.3535533906F;
}

template <bool kPlainSteps, int kDim, int kRows>
__device__ void fill_angles(AngleTable<kDim, kRows>& steps, AngleTable<kDim>& strides,
                            const DecodeCall& call) {
  static_assert(kRows >= kSteps);
  constexpr int kHalf = kDim / 2;
  const float factor = 1.0F / call.rope_scale;
  // Four channels at a time: what it takes is the latency of the loads.
  for (int i = 4 * threadIdx.x; i < kRows * kHalf; i += 4 * blockDim.x) {
    const int row = i / kHalf;
    const int channel = i % kHalf;
    const auto angles = [&](const float* table, std::int64_t position) {
      return position < call.max_positions
                 ? *reinterpret_cast<const float4*>(table + position * kHalf + channel)
                 : float4{};
    };
    const float4 step_cos = angles(call.rope_cos, row);
    const float4 step_sin = angles(call.rope_sin, row);
    const bool has_stride = row < kSteps;
    const float4 stride_cos = has_stride ? angles(call.rope_cos, row * kSteps) : float4{};
    const float4 stride_sin = has_stride ? angles(call.rope_sin, row * kSteps) : float4{};
    // `second` times `sign` is added to `first`.
    const auto put = [&](auto& table, int number, const float4& first, float sign,
                         const float4& second, float norm) {
      const int at = AngleTable<kDim>::offset(row, channel / 32, number, channel % 32 / 8);
      *reinterpret_cast<uint2*>(table.rows + at + channel % 8 * 2) = {
          pack<false>((first.x + sign * second.x) * norm, (first.y + sign * second.y) * norm),
          pack<false>((first.z + sign * second.z) * norm, (first.w + sign * second.w) * norm)};
    };
    if constexpr (kPlainSteps) {
      put(steps, 0, step_cos, 0.0F, step_sin, factor);
      put(steps, 1, step_sin, 0.0F, step_cos, factor);
    } else {
      put(steps, 0, step_cos, -1.0F, step_sin, factor * rest_norm<kDim>());
      put(steps, 1, step_cos, 1.0F, step_sin, factor * rest_norm<kDim>());
    }
    if (!has_stride) continue;
    put(strides, 0, stride_cos, 0.0F, stride_sin, factor);
    put(strides, 1, stride_sin, 0.0F, stride_cos, factor);
  }
}

// Fragments of the query tile for the chunks `chunk` and chunk + kDim / 64, turned back by a
// position whose cos and sin rows, f32 [kDim / 2] each, are at `angles`; 0: as they are.
template <int kDim>
struct QueryPair {
  Words4 low;
  Words4 high;

  __device__ QueryPair(std::uint32_t q, int chunk, std::uint32_t angles, const Lane& lane)
      : low(words(load_query(q, chunk, lane))),
        high(words(load_query(q, chunk + kDim / 64, lane))) {
    if (angles == 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t at = angles + (32 * chunk + 8 * lane.q + 4 * half) * 4;
      const uint4 c = load_shared(at);
      const uint4 s = load_shared(at + 2 * kDim);
      const std::uint32_t cos[2] = {pack<false>(__uint_as_float(c.x), __uint_as_float(c.y)),
                                    pack<false>(__uint_as_float(c.z), __uint_as_float(c.w))};
      const std::uint32_t sin[2] = {pack<false>(__uint_as_float(s.x), __uint_as_float(s.y)),
                                    pack<false>(__uint_as_float(s.z), __uint_as_float(s.w))};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        std::uint32_t& a = low.x[2 * half + i];
        std::uint32_t& b = high.x[2 * half + i];
        const std::uint32_t turned = fma_f16(b, sin[i], mul_f16(a, cos[i]));
        b = fma_f16(b, cos[i], negate_f16(mul_f16(a, sin[i])));
        a = turned;
      }
    }
  }
};

// What the angles of a block's tokens are made of: steps of tokens that follow each other, steps of
// listed ones, steps and strides, or the full table. kAny stands for code that serves all of them
// but kListedSteps.
enum class AngleKind { kSteps, kListedSteps, kStrides, kTable, kAny };
struct BlockAngles {
  AngleKind kind;
  std::uint32_t steps;  // shared addresses of the tables
  std::uint32_t strides;
  std::uint32_t base;  // shared address of the base position's cos and sin rows; 0: none
  int at[4];           // of the lane's tokens w = 2 t + h: step, or position (kTable)
};

// Whether all tokens of a complete listed block are less than kRows steps from the base; then, of
// the lane's tokens, the shared addresses of their angles in the table `steps`. `list` is that of
// the positions.
template <int kDim, int kRows>
__device__ inline bool find_listed_steps(int (&at)[4], std::uint32_t list, bool wide_positions,
                                         std::int32_t first_position, std::uint32_t steps,
                                         const Lane& lane) {
  const bool odd = lane.g % 2 != 0;
  std::uint32_t step[4];
  if (wide_positions) {
    const Words4 a = words(load_shared(list + lane.g / 2 * 32));
    const Words4 b = words(load_shared(list + lane.g / 2 * 32 + 16));
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      step[w] = odd ? a.x[2 * w + 1] : a.x[2 * w];
      step[2 + w] = odd ? b.x[2 * w + 1] : b.x[2 * w];
    }
  } else {
    const Words4 pairs = words(load_shared(list + lane.g / 2 * 16));
#pragma unroll
    for (int w = 0; w < 4; ++w) step[w] = byte_permute(pairs.x[w], 0, odd ? 0x4432 : 0x4410);
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) step[w] -= static_cast<std::uint32_t>(first_position);
  const bool far = (step[0] | step[1] | step[2] | step[3]) >= kRows;
  static_assert((kRows & (kRows - 1)) == 0);
  if (__any_sync(kAllLanes, far || first_position < 0)) return false;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    at[w] = static_cast<int>(steps) +
            AngleTable<kDim, kRows>::offset(static_cast<int>(step[w]), 0, 0, lane.q);
  }
  return true;
}

// `data` is the shared address of what a stage has for RoPE. Of kListedSteps are blocks whose steps
// are all below `n_listed_steps`.
template <int kDim>
__device__ inline BlockAngles block_angles(const Stage& stage, std::uint32_t data, bool is_listed,
                                           bool wide_positions, std::uint32_t steps,
                                           std::uint32_t strides, unsigned n_listed_steps,
                                           std::int64_t max_positions, const Lane& lane) {
  BlockAngles angles{AngleKind::kSteps, steps, strides, data, {}};
  if (!is_listed) {
#pragma unroll
    for (int w = 0; w < 4; ++w) angles.at[w] = lane.key_token() + 2 * w;
    return angles;
  }
  const std::uint32_t list = data + 4 * kDim;
  unsigned farthest = stage.first_position < 0 ? kMaxStep : 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int slot = visible_slot(stage.first(), stage.end(), lane.key_token() + 2 * w);
    const std::uint32_t position =
        wide_positions ? load_shared_4(list + 4 * slot) : load_shared_2(list + 2 * slot);
    const auto last = static_cast<std::uint32_t>(max_positions - 1);
    angles.at[w] = static_cast<int>(position < last ? position : last);
    farthest = max(farthest, static_cast<unsigned>(angles.at[w] - stage.first_position));
  }
  farthest = __reduce_max_sync(kAllLanes, farthest);
  angles.kind = farthest < n_listed_steps ? AngleKind::kListedSteps : AngleKind::kStrides;
  if (farthest >= kMaxStep) {
    angles.kind = AngleKind::kTable;
    angles.base = 0;
    return angles;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) angles.at[w] -= stage.first_position;
  return angles;
}

// cos - sin and cos + sin of a token for the channels of a chunk, with the steps' factor.
struct Angles {
  Words4 less;
  Words4 plus;
};

// Of the lane's token `w`.
template <int kDim, AngleKind kKind>
__device__ inline Angles token_angles(const BlockAngles& block, int w, int chunk,
                                      const DecodeCall& call, const Lane& lane) {
  using Table = AngleTable<kDim>;
  if constexpr (kKind == AngleKind::kSteps) {
    // Token w is 2 w rows behind the lane's first, whose parity it has.
    const std::uint32_t row = block.steps + Table::offset(lane.key_token(), 0, 0, lane.q);
    const std::uint32_t other = block.steps + Table::offset(lane.key_token(), 0, 1, lane.q);
    const int distance = 2 * w * Table::kRowBytes + chunk * Table::kChunkBytes;
    return {words(load_shared(row + distance)), words(load_shared(other + distance))};
  }
  const int at = block.at[w];
  if constexpr (kKind == AngleKind::kListedSteps) {
    // The table is aligned so that the other number is where one bit differs.
    const auto place = static_cast<std::uint32_t>(at);
    return {words(load_shared(place + chunk * Table::kChunkBytes)),
            words(load_shared((place ^ 64U) + chunk * Table::kChunkBytes))};
  }
  const AngleKind kind = kKind == AngleKind::kAny ? block.kind : kKind;
  if (kind == AngleKind::kTable) {
    const std::int64_t row = std::int64_t{at} * (kDim / 2) + 32 * chunk + 8 * lane.q;
    const float* cos = call.rope_cos + row;
    const float* sin = call.rope_sin + row;
    Angles a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float c0 = cos[2 * i] * rest_norm<kDim>();
      const float c1 = cos[2 * i + 1] * rest_norm<kDim>();
      const float s0 = sin[2 * i] * rest_norm<kDim>();
      const float s1 = sin[2 * i + 1] * rest_norm<kDim>();
      a.less.x[i] = pack<false>(c0 - s0, c1 - s1);
      a.plus.x[i] = pack<false>(c0 + s0, c1 + s1);
    }
    return a;
  }
  const int step = at % kSteps;
  Angles a{words(load_shared(block.steps + Table::offset(step, chunk, 0, lane.q))),
           words(load_shared(block.steps + Table::offset(step, chunk, 1, lane.q)))};
  if (kind == AngleKind::kStrides) {
    const int stride = at / kSteps;
    const Words4 cos = words(load_shared(block.strides + Table::offset(stride, chunk, 0, lane.q)));
    const Words4 sin = words(load_shared(block.strides + Table::offset(stride, chunk, 1, lane.q)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t less =
          fma_f16(negate_f16(sin.x[i]), a.plus.x[i], mul_f16(cos.x[i], a.less.x[i]));
      a.plus.x[i] = fma_f16(sin.x[i], a.less.x[i], mul_f16(cos.x[i], a.plus.x[i]));
      a.less.x[i] = less;
    }
  }
  return a;
}

}  // namespace spindle::kernels::device
