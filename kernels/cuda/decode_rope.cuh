#pragma once
// Keys before RoPE. The queries are turned back by a block's base position, and the keys by the
// small steps from there: angles of the steps 0..31 and of the strides 0, 32 .. 992 lie in shared
// memory, in f16. Positions farther from the base take their rows of the full table.

#include <cstdint>

#include "kernels/cuda/decode_int4.cuh"

namespace spindle::kernels::device {

inline constexpr int kSteps = 32;
inline constexpr int kMaxStep = kSteps * kSteps;

// Angles [32 rows][kDim / 64 chunks][2 numbers][4 quads][8 channels], f16. Steps hold cos - sin and
// cos + sin, times a factor for the Hadamard transform; strides hold cos and sin. The two numbers
// change places in odd rows, so that neighbouring rows lie in different banks.
template <int kDim>
struct alignas(16) AngleTable {
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kChunkBytes = 128;
  std::byte rows[kSteps * kRowBytes];

  __device__ static int offset(int row, int chunk, int number, int quad) {
    return row * kRowBytes + chunk * kChunkBytes + (number ^ (row & 1)) * 64 + quad * 16;
  }
};

// The butterflies that are left when the tensor cores have done four stages.
template <int kDim>
__device__ constexpr float rest_norm() {
  return kDim == 64 ? 0.5F : 0.3535533906F;
}

template <int kDim>
__device__ void fill_angles(AngleTable<kDim>& steps, AngleTable<kDim>& strides,
                            const DecodeCall& call) {
  constexpr int kHalf = kDim / 2;
  const float factor = 1.0F / call.rope_scale;
  for (int i = threadIdx.x; i < kSteps * kHalf; i += blockDim.x) {
    const int row = i / kHalf;
    const int channel = i % kHalf;
    const auto put = [&](AngleTable<kDim>& table, int number, float value) {
      const int at = AngleTable<kDim>::offset(row, channel / 32, number, channel % 32 / 8);
      reinterpret_cast<__half*>(table.rows + at)[channel % 8] = __float2half_rn(value);
    };
    const auto angle = [&](const float* table, std::int64_t position) {
      return position < call.max_positions ? table[position * kHalf + channel] * factor : 0.0F;
    };
    const float step_cos = angle(call.rope_cos, row);
    const float step_sin = angle(call.rope_sin, row);
    put(steps, 0, (step_cos - step_sin) * rest_norm<kDim>());
    put(steps, 1, (step_cos + step_sin) * rest_norm<kDim>());
    put(strides, 0, angle(call.rope_cos, row * kSteps));
    put(strides, 1, angle(call.rope_sin, row * kSteps));
  }
}

struct Words4 {
  std::uint32_t x[4];
};
__device__ inline Words4 words(const uint4& v) { return {{v.x, v.y, v.z, v.w}}; }

__device__ inline uint4 joined(const Words4& w) { return {w.x[0], w.x[1], w.x[2], w.x[3]}; }

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

// What the angles of a block's tokens are made of. kAny stands for code that serves all of them.
enum class AngleKind { kSteps, kStrides, kTable, kAny };
struct BlockAngles {
  AngleKind kind;
  std::uint32_t steps;  // shared addresses of the tables
  std::uint32_t strides;
  std::uint32_t base;  // shared address of the base position's cos and sin rows; 0: none
  int at[4];           // of the lane's tokens w = 2 t + h: step, or position (kTable)
};

// `data` is the shared address of what a stage has for RoPE.
template <int kDim>
__device__ inline BlockAngles block_angles(const Stage& stage, std::uint32_t data, bool is_listed,
                                           bool wide_positions, std::uint32_t steps,
                                           std::uint32_t strides, std::int64_t max_positions,
                                           const Lane& lane) {
  BlockAngles angles{AngleKind::kSteps, steps, strides, data, {}};
  if (!is_listed) {
#pragma unroll
    for (int w = 0; w < 4; ++w) angles.at[w] = lane.key_token() + 2 * w;
    return angles;
  }
  angles.kind = AngleKind::kStrides;
  const std::uint32_t list = data + 4 * kDim;
  bool far = stage.first_position < 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int slot = visible_slot(stage.first(), stage.end(), lane.key_token() + 2 * w);
    const std::uint32_t position =
        wide_positions ? load_shared_4(list + 4 * slot) : load_shared_2(list + 2 * slot);
    const auto last = static_cast<std::uint32_t>(max_positions - 1);
    angles.at[w] = static_cast<int>(position < last ? position : last);
    far |= static_cast<unsigned>(angles.at[w] - stage.first_position) >= kMaxStep;
  }
  if (__any_sync(kAllLanes, far)) {
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
