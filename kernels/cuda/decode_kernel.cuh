#pragma once
// Decode attention: split-KV over a grid that fills the device once. kernels/cuda/decode_plan.cuh
// says how the work is cut, decode_pipe.cuh how data comes in, decode_softmax.cuh what a warp
// holds.
//
// Within a CTA the warps take the units of a segment (a range of units of one entry) round robin,
// each with a softmax of its own, and merge at the segment's end. A segment that is a whole entry
// is written out. Parts of an entry go to the CTA's slots, and the CTA that arrives last merges
// them.

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "kernels/core/cuda_check.h"
#include "kernels/cuda/decode_int4.cuh"
#include "kernels/cuda/decode_kivi.cuh"
#include "kernels/cuda/decode_launch.h"
#include "kernels/cuda/decode_lloyd.cuh"
#include "kernels/cuda/decode_plan.cuh"
#include "kernels/cuda/decode_raw.cuh"
#include "kernels/cuda/decode_rows.cuh"

namespace spindle::kernels::device {

struct Nothing {};
template <typename C>
using AnglesOf = std::conditional_t<C::kBeforeRope, AngleTable<C::kDim>, Nothing>;

template <typename C>
struct alignas(128) Shared {
  static constexpr int kDim = C::kDim;
  static constexpr int kRowFloats = kDim + 4;  // so that 8 rows' channels lie in different banks

  // [warp][stage]; at a segment's end the sums of each warp, [8][kRowFloats].
  std::byte ring[C::kWarps][C::kStages * C::kStageBytes];
  alignas(16) DeviceKvBlock descriptors[C::kWarps][kDescriptors];
  Stage stages[C::kWarps][kListedStages];
  uint4 q[kDim / 32 * 32];           // fragments of load_query()
  uint4 q_hadamard[kDim / 32 * 32];  // as nibble_products() wants it
  uint4 k_mean[kDim / 32 * 4];       // as lloyd_keys() wants it
  // Query tiles turned back by each warp, fragments of load_query().
  std::conditional_t<C::kLloyd, uint4[kDim / 32 * 32], Nothing> turned[C::kWarps];
  AnglesOf<C> steps;
  AnglesOf<C> strides;
  DecodeEntry entry;
  float best[C::kWarps][kDecodeTileHeads];
  float mass[C::kWarps][kDecodeTileHeads];
  float q_sums[kDecodeTileHeads];
  int is_last;

  static_assert(sizeof(ring[0]) >= sizeof(float) * kDecodeTileHeads * kRowFloats);
};

// A range of units of one entry, and how its sums leave the CTA.
struct Segment {
  int entry;
  int begin;
  int end;
  bool whole;
  int slot;  // of the CTA, when not whole
};

// Fragment that holds the channels 8 k .. 8 k + 7 of a head.
__device__ inline int query_fragment(int head, int k) { return k / 4 * 32 + head * 4 + k % 4; }

template <typename C>
__device__ void load_queries(Shared<C>& shared, const DecodeCall& call) {
  constexpr int kDim = C::kDim;
  const DecodeEntry& entry = shared.entry;
  const F16* q = call.q + entry.row * call.q_stride + std::int64_t{entry.first_head} * kDim;
  for (int i = threadIdx.x; i < kDecodeTileHeads * kDim / 8; i += C::kThreads) {
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
  for (int head = threadIdx.x / 32; head < kDecodeTileHeads; head += C::kWarps) {
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
__device__ void prepare(Shared<C>& shared, const Pipe<C>& pipe, bool& has_angles) {
  load_queries(shared, pipe.call);
  const DeviceKvHead& head = shared.entry.head;
  if (head.n_blocks > 0) {
    if constexpr (C::kLloyd) {
      if (head.k_mean != kNoPlace && threadIdx.x / 32 == C::kWarps - 1) {
        rotate_mean(shared, reinterpret_cast<const std::uint16_t*>(pipe.at(head.k_mean)));
      }
    }
    if constexpr (C::kBeforeRope) {
      if (!has_angles && pipe.call.rope_cos != nullptr) {
        fill_angles(shared.steps, shared.strides, pipe.call);
      }
      has_angles = true;
    }
    if constexpr (C::kInt4) {
      __syncthreads();
      rotate_queries(shared);
    }
  }
  __syncthreads();
}

// Scores of keys before RoPE by the query tile `q`, turned back as `block` says. Compiled per kind
// of angles: a branch at every angle would keep loads from being overlapped.
template <AngleKind kKind, typename C>
__device__ void turned_scores(Shared<C>& shared, const Pipe<C>& pipe, Softmax<C::kDim>& s,
                              const Stage& stage, std::uint32_t data, std::uint32_t q,
                              const BlockAngles& block) {
  const Lane& lane = pipe.lane;
  const DecodeCall& call = pipe.call;
  const KvFormat format = stage.format();
  if constexpr (C::kLloyd) {
    const std::uint32_t k_mean = shared_address(shared.k_mean);
    switch (format) {
      case KvFormat::kLloyd1:
        return lloyd_scores<1, kKind>(s, data, q, k_mean, block, call, lane);
      case KvFormat::kLloyd2:
        return lloyd_scores<2, kKind>(s, data, q, k_mean, block, call, lane);
      case KvFormat::kLloyd3:
        return lloyd_scores<3, kKind>(s, data, q, k_mean, block, call, lane);
      case KvFormat::kLloyd4:
        return lloyd_scores<4, kKind>(s, data, q, k_mean, block, call, lane);
      default:
        break;
    }
  }
  if constexpr (C::kRows) {
    row_scores<kKind>(s, data, stage.part(), q, block, format == KvFormat::kCodebook, call, lane);
  }
}

// The queries are turned back to the block's base position, keys by their steps from there.
template <typename C>
__device__ void scores_before_rope(Shared<C>& shared, const Pipe<C>& pipe, Softmax<C::kDim>& s,
                                   const Stage& stage, std::uint32_t data) {
  const Lane& lane = pipe.lane;
  const BlockAngles block =
      block_angles<C::kDim>(stage, data + C::kRopeOffset, pipe.positions_of(stage) != kNoPlace,
                            shared.entry.head.wide_positions != 0, shared_address(&shared.steps),
                            shared_address(&shared.strides), pipe.call.max_positions, lane);
  std::uint32_t q = shared_address(shared.q);
  if constexpr (C::kLloyd) {
    if (has_levels(stage.format()) && block.base != 0) {
      auto& turned = shared.turned[threadIdx.x / 32];
#pragma unroll
      for (int chunk = 0; chunk < C::kDim / 64; ++chunk) {
        const QueryPair<C::kDim> pair(q, chunk, block.base, lane);
        turned[chunk * 32 + lane.index] = joined(pair.low);
        turned[(chunk + C::kDim / 64) * 32 + lane.index] = joined(pair.high);
      }
      q = shared_address(turned);
    }
  }
  switch (block.kind) {
    case AngleKind::kSteps:
      return turned_scores<AngleKind::kSteps>(shared, pipe, s, stage, data, q, block);
    case AngleKind::kStrides:
      return turned_scores<AngleKind::kStrides>(shared, pipe, s, stage, data, q, block);
    case AngleKind::kTable:
      return turned_scores<AngleKind::kTable>(shared, pipe, s, stage, data, q, block);
  }
}

template <typename C>
__device__ void stage_scores(Shared<C>& shared, const Pipe<C>& pipe, Softmax<C::kDim>& s,
                             const Stage& stage, std::uint32_t data) {
  const Lane& lane = pipe.lane;
  const std::uint32_t q = shared_address(shared.q);
  const KvFormat format = stage.format();
  if (format == KvFormat::kRaw) {
    return raw_scores<C::kDim, C::kBf16>(s, data, stage.part(), q, lane);
  }
  if constexpr (C::kInt4) {
    if (format == KvFormat::kInt4) {
      return int4_scores(s, data, shared_address(shared.q_hadamard), shared.q_sums, lane);
    }
  }
  if constexpr (C::kKivi) {
    if (format == KvFormat::kKivi4) return kivi_scores<4>(s, data, q, lane);
    if (format == KvFormat::kKivi2) return kivi_scores<2>(s, data, q, lane);
  }
  if constexpr (C::kBeforeRope) scores_before_rope(shared, pipe, s, stage, data);
}

template <typename C>
__device__ void stage_values(Softmax<C::kDim>& s, const Stage& stage, std::uint32_t data,
                             const Lane& lane) {
  const KvFormat format = stage.format();
  if (format == KvFormat::kRaw) return raw_values<C::kDim, C::kBf16>(s, data, stage, lane);
  if constexpr (C::kInt4) {
    if (format == KvFormat::kInt4) return int4_values(s, data, lane);
  }
  if constexpr (C::kKivi) {
    if (format == KvFormat::kKivi4) return kivi_values<4>(s, data, lane);
    if (format == KvFormat::kKivi2) return kivi_values<2>(s, data, lane);
  }
  if constexpr (C::kLloyd) {
    switch (format) {
      case KvFormat::kLloyd1:
        return lloyd_values<1>(s, data, lane);
      case KvFormat::kLloyd2:
        return lloyd_values<2>(s, data, lane);
      case KvFormat::kLloyd3:
        return lloyd_values<3>(s, data, lane);
      case KvFormat::kLloyd4:
        return lloyd_values<4>(s, data, lane);
      default:
        break;
    }
  }
  if constexpr (C::kRows) {
    row_values(s, data, stage.part(), format == KvFormat::kCodebook, lane);
  }
}

// The first rounds only issue stages; the CTA prepares the queries while they are under way. No
// warp has more than n_rounds units.
template <typename C>
__device__ void run_stages(Shared<C>& shared, Pipe<C>& pipe, Softmax<C::kDim>& s, int n_rounds,
                           bool& has_angles) {
  std::uint32_t slot = 0;
  for (int i = -C::kStages;; ++i) {
    Stage stage = {};
    if (i == 0) prepare(shared, pipe, has_angles);
    if (i >= 0) {
      const bool is_over = i >= pipe.n_issued;
      if (!is_over) {
        wait_copies<C::kStages - 1>();
        __syncwarp();
        stage = pipe.listed(i);
      }
      // The one place where the basis changes: the transform is much code.
      if constexpr (C::kInt4 || C::kLloyd) {
        if (is_over || !stage.is_key()) {
          s.change_basis(is_over ? Basis::kPlain : basis_of(stage.format()), pipe.lane);
        }
      }
      if (is_over) break;
      const std::uint32_t data = pipe.ring + slot;
      if (stage.is_key()) {
        stage_scores(shared, pipe, s, stage, data);
      } else {
        stage_values<C>(s, stage, data, pipe.lane);
      }
      slot = pipe.next_slot(slot);
      __syncwarp();
    }
    pipe.issue();
    if (stage.is_last_key()) {
      if constexpr (C::kLockstep) __syncthreads();
      s.template step<C::kInt4, C::kLloyd>(stage, pipe.lane, pipe.call.scale);
    }
  }
  if constexpr (C::kLockstep) {
    for (int i = pipe.n_units; i < n_rounds; ++i) __syncthreads();
  }
  wait_copies<0>();
  __syncwarp();
}

// The sums of one head over parts whose maxima, masses and values `part(i)` gives: maximum and
// mass.
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

// Sums of the CTA's warps, which lie in the ring, to the output or to the CTA's slot.
template <typename C>
__device__ void write_segment(Shared<C>& shared, const DecodeCall& call, const Segment& segment,
                              float* partial) {
  constexpr int kDim = C::kDim;
  constexpr int kQuads = kDim / 4;
  for (int i = threadIdx.x; i < shared.entry.n_heads * kQuads; i += C::kThreads) {
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
      const auto* row =
          reinterpret_cast<const float*>(shared.ring[w]) + head * Shared<C>::kRowFloats + channel;
      add_scaled(sum, *reinterpret_cast<const float4*>(row), factor);
    }
    if (segment.whole) {
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

// What the CTAs [first_part, last_part] of the entry have put into their slots, to the output.
template <typename C>
__device__ void merge_parts(Shared<C>& shared, const DecodePlan& plan, const DecodeCall& call) {
  constexpr int kDim = C::kDim;
  constexpr int kQuads = kDim / 4;
  constexpr int kFloats = static_cast<int>(decode_partial_floats(kDim));
  const DecodeEntry& entry = shared.entry;
  const int n_parts = entry.last_part - entry.first_part + 1;
  // A CTA's slot is 0 when its share begins in the entry. Only the first part's may begin before.
  const std::int64_t* shares = plan.shares + std::int64_t{call.layer} * (plan.n_ctas + 1);
  const int first_slot = shares[entry.first_part] < entry.begin ? 1 : 0;
  const float* first = plan.partials + std::int64_t{entry.first_part} * 2 * kFloats;
  const auto part_of = [&](int i) {
    return first + std::int64_t{2 * i + (i == 0 ? first_slot : 0)} * kFloats;
  };
  auto* best = reinterpret_cast<float*>(shared.ring);  // [n_parts][8], then the masses
  float* mass = best + n_parts * kDecodeTileHeads;
  for (int i = threadIdx.x; i < n_parts * kDecodeTileHeads; i += C::kThreads) {
    const int head = i % kDecodeTileHeads;
    const float* part = part_of(i / kDecodeTileHeads) + kDecodeTileHeads * kDim;
    if (head >= entry.n_heads) continue;
    best[i] = __ldcg(part + head);
    mass[i] = __ldcg(part + kDecodeTileHeads + head);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < entry.n_heads * kQuads; i += C::kThreads) {
    const int head = i / kQuads;
    const int channel = 4 * (i % kQuads);
    Merged all;
    for (int part = 0; part < n_parts; ++part) {
      all.best = fmaxf(all.best, best[part * kDecodeTileHeads + head]);
    }
    float4 sum = {};
#pragma unroll 8
    for (int part = 0; part < n_parts; ++part) {
      const float factor = part_factor(best[part * kDecodeTileHeads + head], all.best);
      all.mass = fmaf(mass[part * kDecodeTileHeads + head], factor, all.mass);
      const float* row = part_of(part) + head * kDim + channel;
      add_scaled(sum, __ldcg(reinterpret_cast<const float4*>(row)), factor);
    }
    write_output<kDim>(call, entry, head, channel, sum, all.mass);
  }
}

template <typename C>
__device__ void run_segment(Shared<C>& shared, const DecodePlan& plan, const DecodeCall& call,
                            const Segment& segment, bool& has_angles) {
  constexpr int kDim = C::kDim;
  const int warp = threadIdx.x / 32;
  const int n_units = segment.end - segment.begin - warp;
  Pipe<C> pipe{.call = call,
               .entry = &shared.entry,
               .stages = shared.stages[warp],
               .ring = shared_address(shared.ring[warp]),
               .descriptors = shared_address(shared.descriptors[warp]),
               .lane = {},
               .first_unit = segment.begin + warp,
               .n_units = n_units > 0 ? (n_units + C::kWarps - 1) / C::kWarps : 0};
  pipe.start();
  Softmax<kDim> s;
  s.start();
  run_stages(shared, pipe, s, (segment.end - segment.begin + C::kWarps - 1) / C::kWarps,
             has_angles);
  const std::uint32_t v_mean = shared.entry.head.v_mean;
  s.finish(pipe.lane,
           v_mean == kNoPlace ? nullptr : reinterpret_cast<const std::uint16_t*>(pipe.at(v_mean)));

  const Lane lane;
  auto* sums = reinterpret_cast<float*>(shared.ring[warp]);
#pragma unroll
  for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      sums[(2 * lane.q + r % 2) * Shared<C>::kRowFloats + 16 * m + 8 * (r / 2) + lane.g] =
          s.values[m][r];
    }
  }
  if (lane.g == 0) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      shared.best[warp][2 * lane.q + e] = s.best[e];
      shared.mass[warp][2 * lane.q + e] = s.mass[e];
    }
  }
  __syncthreads();
  float* partial =
      plan.partials + (std::int64_t{blockIdx.x} * 2 + segment.slot) * decode_partial_floats(kDim);
  write_segment(shared, call, segment, partial);
  if (segment.whole) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto last = static_cast<std::uint32_t>(shared.entry.last_part - shared.entry.first_part);
    shared.is_last = atomicAdd(plan.arrivals + segment.entry, 1U) == last;
    if (shared.is_last != 0) plan.arrivals[segment.entry] = 0;
  }
  __syncthreads();
  if (shared.is_last == 0) return;
  __threadfence();
  merge_parts(shared, plan, call);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, kCtasPerMultiprocessor)
    decode_kernel(const __grid_constant__ DecodePlan plan,
                  const __grid_constant__ DecodeCall call) {
  extern __shared__ std::byte dynamic_shared[];
  auto& shared = *reinterpret_cast<Shared<C>*>(dynamic_shared);
  const int cta = static_cast<int>(blockIdx.x);
  const std::int64_t* shares = plan.shares + std::int64_t{call.layer} * (plan.n_ctas + 1);
  const std::int64_t begin = shares[cta];
  const std::int64_t end = shares[cta + 1];
  if (begin == end) return;
  const DecodeEntry* entries = plan.entries + std::int64_t{call.layer} * plan.max_entries;
  int index = plan.first_entry[std::int64_t{call.layer} * plan.n_ctas + cta];
  bool has_angles = false;
  for (std::int64_t at = begin; at < end; ++index) {
    __syncthreads();
    if (threadIdx.x < sizeof(DecodeEntry) / sizeof(uint4)) {
      reinterpret_cast<uint4*>(&shared.entry)[threadIdx.x] =
          reinterpret_cast<const uint4*>(entries + index)[threadIdx.x];
    }
    __syncthreads();
    const DecodeEntry& entry = shared.entry;
    if (entry.begin == entry.end) continue;
    const std::int64_t stop = end < entry.end ? end : entry.end;
    const Segment segment = {index, unit_at(entry, at - entry.begin),
                             unit_at(entry, stop - entry.begin),
                             entry.first_part == entry.last_part, at > begin ? 1 : 0};
    run_segment(shared, plan, call, segment, has_angles);
    at = stop;
  }
}

template <typename C>
int allow_and_count() {
  constexpr int kBytes = static_cast<int>(sizeof(Shared<C>));
  // All sets run on one grid: one that does not fit twice would halve the grid of the others.
  static_assert(kCtasPerMultiprocessor * (kBytes + 1024) <= kSharedBytesPerMultiprocessor);
  cuda_check(
      cudaFuncSetAttribute(decode_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "shared memory of attention_decode");
  int n = 0;
  cuda_check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, decode_kernel<C>, C::kThreads, kBytes),
      "occupancy of attention_decode");
  return n;
}

template <DecodeFormats kFormats>
int ctas_per_multiprocessor(int head_dim) {
  if (head_dim == 64) {
    return min(allow_and_count<Config<64, false, kFormats>>(),
               allow_and_count<Config<64, true, kFormats>>());
  }
  return min(allow_and_count<Config<128, false, kFormats>>(),
             allow_and_count<Config<128, true, kFormats>>());
}

template <typename C>
void launch(cudaStream_t stream, const DecodePlan& plan, const DecodeCall& call) {
  decode_kernel<C><<<plan.n_ctas, C::kThreads, sizeof(Shared<C>), stream>>>(plan, call);
}

template <DecodeFormats kFormats>
void launch_formats(CUstream_st* stream, const DecodePlan& plan, const DecodeCall& call) {
  const bool is_bf16 = call.dtype == DType::kBF16;
  if (call.head_dim == 64) {
    is_bf16 ? launch<Config<64, true, kFormats>>(stream, plan, call)
            : launch<Config<64, false, kFormats>>(stream, plan, call);
  } else {
    is_bf16 ? launch<Config<128, true, kFormats>>(stream, plan, call)
            : launch<Config<128, false, kFormats>>(stream, plan, call);
  }
  check_launch("attention_decode");
}

}  // namespace spindle::kernels::device
