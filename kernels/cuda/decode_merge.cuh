#pragma once
// How the sums of warps and of parts of an entry become the output of decode attention.

#include "kernels/cuda/decode_plan.cuh"
#include "kernels/cuda/decode_team.cuh"
#include "kernels/cuda/mma.cuh"

namespace spindle::kernels::device {

// The sums of one head over parts: maximum and mass.
struct Merged {
  float best = -INFINITY;
  float mass = 0;
};

__device__ inline float part_factor(float best, float of_all) {
  return best == -INFINITY ? 0.0F : exp2_fast(best - of_all);
}

__device__ inline void add_scaled(float4& sum, const float4& x, float factor) {
  sum.x = fmaf(x.x, factor, sum.x);
  sum.y = fmaf(x.y, factor, sum.y);
  sum.z = fmaf(x.z, factor, sum.z);
  sum.w = fmaf(x.w, factor, sum.w);
}

template <int kDim>
__device__ void write_output(const DecodeCall& call, const DecodeEntry& entry, int head,
                             int channel, const float4& sum, float mass) {
  const float factor = 1.0F / mass;
  const uint2 bits = {pack<true>(sum.x * factor, sum.y * factor),
                      pack<true>(sum.z * factor, sum.w * factor)};
  Bf16* out = call.out + entry.row * call.out_stride +
              std::int64_t{entry.first_head + head} * kDim + channel;
  *reinterpret_cast<uint2*>(out) = bits;
}

// Sums of the team's warps, which lie in their rings, to the output when all of the entry is in the
// share, or else to its slot.
template <typename C>
__device__ void write_segment(CtaShared<C>& cta, Shared<C>& shared, const DecodeCall& call,
                              float* partial) {
  constexpr int kDim = C::kDim;
  const bool is_whole = shared.entry.first_part == shared.entry.last_part;
  constexpr int kQuads = kDim / 4;
  for (int i = Team<C>::thread(); i < shared.entry.n_heads * kQuads; i += C::kThreads) {
    const int head = i / kQuads;
    const int channel = 4 * (i % kQuads);
    Merged all;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) all.best = fmaxf(all.best, shared.best[w][head]);
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      const float factor = part_factor(shared.best[w][head], all.best);
      all.mass = fmaf(shared.mass[w][head], factor, all.mass);
      const auto* row = reinterpret_cast<const float*>(cta.ring(Team<C>::of_cta(), w)) +
                        head * Shared<C>::kRowFloats + channel;
      add_scaled(sum, *reinterpret_cast<const float4*>(row), factor);
    }
    if (is_whole) {
      write_output<kDim>(call, shared.entry, head, channel, sum, all.mass);
      continue;
    }
    *reinterpret_cast<float4*>(partial + head * kDim + channel) = sum;
    if (channel == 0) {
      partial[kDecodeTileHeads * kDim + head] = all.best;
      partial[kDecodeTileHeads * (kDim + 1) + head] = all.mass;
    }
  }
}

// What the teams [first_part, last_part] of the entry have put into their slots, to the output. The
// loads of a round are on their way together.
template <typename C>
__device__ void merge_parts(Shared<C>& shared, const DecodePlan& plan, const DecodeCall& call) {
  constexpr int kDim = C::kDim;
  constexpr int kQuads = kDim / 4;
  constexpr int kFloats = static_cast<int>(decode_partial_floats(kDim));
  constexpr int kRound = 8;
  const DecodeEntry& entry = shared.entry;
  const int n_parts = entry.last_part - entry.first_part + 1;
  const float* first = plan.partials + std::int64_t{entry.first_part} * 2 * kFloats;
  for (int i = Team<C>::thread(); i < entry.n_heads * kQuads; i += C::kThreads) {
    const int head = i / kQuads;
    const int channel = 4 * (i % kQuads);
    Merged all;
    float4 sum = {};
#pragma unroll 1
    for (int begin = 0; begin < n_parts; begin += kRound) {
      float4 values[kRound];
      float best[kRound];
      float mass[kRound];
#pragma unroll
      for (int k = 0; k < kRound; ++k) {
        // Behind the last part the last one again, with no weight.
        const int part = min(begin + k, n_parts - 1);
        // A team's slot is 0 when its share begins in the entry: only the first part's may not.
        const float* sums =
            first + std::int64_t{2 * part + (part == 0 ? entry.first_slot : 0)} * kFloats;
        values[k] = __ldcg(reinterpret_cast<const float4*>(sums + head * kDim + channel));
        best[k] = __ldcg(sums + kDecodeTileHeads * kDim + head);
        mass[k] = __ldcg(sums + kDecodeTileHeads * (kDim + 1) + head);
      }
      float high = all.best;
#pragma unroll
      for (int k = 0; k < kRound; ++k) high = fmaxf(high, best[k]);
      const float earlier = part_factor(all.best, high);
      all.best = high;
      all.mass *= earlier;
      sum = {sum.x * earlier, sum.y * earlier, sum.z * earlier, sum.w * earlier};
#pragma unroll
      for (int k = 0; k < kRound; ++k) {
        const float factor = begin + k < n_parts ? part_factor(best[k], high) : 0.0F;
        all.mass = fmaf(mass[k], factor, all.mass);
        add_scaled(sum, values[k], factor);
      }
    }
    write_output<kDim>(call, entry, head, channel, sum, all.mass);
  }
}

}  // namespace spindle::kernels::device
