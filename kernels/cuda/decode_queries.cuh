#pragma once
// What a team makes of an entry before its blocks: the query tile as fragments, the same in the
// Hadamard basis for int4, and the mean of the keys in that basis.

#include <cstdint>

#include "kernels/cuda/decode_int4.cuh"
#include "kernels/cuda/decode_team.cuh"

namespace spindle::kernels::device {

// Fragment that holds the channels 8 k .. 8 k + 7 of a head.
__device__ inline int query_fragment(int head, int k) { return k / 4 * 32 + head * 4 + k % 4; }

template <typename C>
__device__ void load_queries(Shared<C>& shared, const DecodeCall& call) {
  constexpr int kDim = C::kDim;
  const DecodeEntry& entry = shared.entry;
  const F16* q = call.q + entry.row * call.q_stride + std::int64_t{entry.first_head} * kDim;
  for (int i = Team<C>::thread(); i < kDecodeTileHeads * kDim / 8; i += C::kThreads) {
    const int head = i / (kDim / 8);
    const int k = i % (kDim / 8);
    uint4 x = {};
    if (head < entry.n_heads) x = *reinterpret_cast<const uint4*>(q + head * kDim + 8 * k);
    shared.q[query_fragment(head, k)] = x;
  }
}

// One vector to the Hadamard basis. A lane has channels 32 i + lane.
template <int kDim>
__device__ void rotate(float (&x)[kDim / 32], int lane) {
#pragma unroll
  for (float& value : x) {
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, value, bit);
      value = other + ((lane & bit) != 0 ? -value : value);
    }
    value *= norm<kDim>();
  }
#pragma unroll
  for (int bit = 1; bit < kDim / 32; bit *= 2) {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      if ((i & bit) != 0) continue;
      const float sum = x[i] + x[i + bit];
      x[i + bit] = x[i] - x[i + bit];
      x[i] = sum;
    }
  }
}

template <typename C>
__device__ void rotate_queries(Shared<C>& shared) {
  constexpr int kDim = C::kDim;
  const int lane = threadIdx.x % 32;
  auto* in = reinterpret_cast<const __half*>(shared.q);
  auto* out = reinterpret_cast<__half*>(shared.q_hadamard);
  for (int head = Team<C>::warp(); head < kDecodeTileHeads; head += C::kWarps) {
    float x[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      x[i] = __half2float(in[query_fragment(head, (32 * i + lane) / 8) * 8 + lane % 8]);
    }
    rotate<kDim>(x, lane);
    // Odd pairs of channels are divided by 16; their sum is taken of what was rounded.
    const float step = lane / 2 % 2 == 0 ? 1.0F : 0.0625F;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const __half rounded = __float2half_rn(x[i] * step);
      out[query_fragment(head, (32 * i + lane) / 8) * 8 + lane % 8] = rounded;
      sum += __half2float(rounded) / step;
    }
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    if (lane == 0) shared.q_sums[head] = sum;
  }
}

// The mean of K in the Hadamard basis, by one warp.
template <typename C>
__device__ void rotate_mean(Shared<C>& shared, const std::uint16_t* mean) {
  constexpr int kDim = C::kDim;
  const int lane = threadIdx.x % 32;
  float x[kDim / 32];
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) x[i] = half_bits_to_float(mean[32 * i + lane]);
  rotate<kDim>(x, lane);
  auto* out = reinterpret_cast<__half*>(shared.k_mean);
  const int at = lane / 8 * 8 + lane % 2 * 4 + lane % 8 / 2;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) out[32 * i + at] = __float2half_rn(x[i]);
}

// The queries, and what blocks need besides.
template <typename C>
__device__ void prepare(Shared<C>& shared, const DecodeCall& call) {
  load_queries(shared, call);
  const DeviceKvHead& head = shared.entry.head;
  if (head.n_blocks > 0) {
    if constexpr (C::kLloyd) {
      if (head.k_mean != kNoPlace && Team<C>::warp() == C::kWarps - 1) {
        rotate_mean(shared, reinterpret_cast<const std::uint16_t*>(place_of(call, head.k_mean)));
      }
    }
    if constexpr (C::kInt4) {
      Team<C>::sync();
      rotate_queries(shared);
    }
  }
  Team<C>::sync();
}

}  // namespace spindle::kernels::device
