#pragma once
// Decode attention: split-KV over a grid that fills the device once. kernels/cuda/decode_plan.cuh
// says how the work is cut, decode_pipe.cuh and decode_feed.cuh how data comes in,
// decode_softmax.cuh what a warp holds.
//
// A share of the work belongs to a team: a CTA, or half of one where two teams share tables. Its
// warps take the units of a segment (a range of units of one entry) round robin, each with a
// softmax of its own, and merge at the segment's end. A segment that is a whole entry is written
// out. Parts of an entry go to the team's slots, and the team that arrives last merges them.

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/core/cuda_check.h"
#include "kernels/cuda/decode_feed.cuh"
#include "kernels/cuda/decode_int4.cuh"
#include "kernels/cuda/decode_kivi.cuh"
#include "kernels/cuda/decode_launch.h"
#include "kernels/cuda/decode_lloyd.cuh"
#include "kernels/cuda/decode_merge.cuh"
#include "kernels/cuda/decode_raw.cuh"
#include "kernels/cuda/decode_rows.cuh"
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

// Scores of keys before RoPE by the query tile `q`, turned back as `block` says. Levels are
// compiled per kind of angles: a branch at every angle would keep loads from being overlapped.
template <AngleKind kKind, typename C>
__device__ void turned_scores(Shared<C>& shared, Tables<C>& tables, const DecodeCall& call,
                              const Lane& lane, Softmax<C::kDim>& s, const Stage& stage,
                              std::uint32_t data, std::uint32_t q, const BlockAngles& block) {
  const KvFormat format = stage.format();
  if constexpr (C::kLloyd) {
    const std::uint32_t k_mean = shared_address(shared.k_mean);
    const LevelLookup<C::kLevelTable> levels(shared_address(&tables.levels));
    switch (format) {
      case KvFormat::kLloyd1:
        return lloyd_scores<1, kKind>(s, data, q, k_mean, block, levels, call, lane);
      case KvFormat::kLloyd2:
        return lloyd_scores<2, kKind>(s, data, q, k_mean, block, levels, call, lane);
      case KvFormat::kLloyd3:
        return lloyd_scores<3, kKind>(s, data, q, k_mean, block, levels, call, lane);
      case KvFormat::kLloyd4:
        return lloyd_scores<4, kKind>(s, data, q, k_mean, block, levels, call, lane);
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
__device__ void scores_before_rope(Shared<C>& shared, Tables<C>& tables, const DecodeCall& call,
                                   const Lane& lane, Softmax<C::kDim>& s, const Stage& stage,
                                   std::uint32_t data) {
  const BlockAngles block = block_angles<C::kDim>(
      stage, data + C::kRopeOffset, stage.is_listed(), shared.entry.head.wide_positions != 0,
      shared_address(&tables.steps), shared_address(&tables.strides), call.max_positions, lane);
  std::uint32_t q = shared_address(shared.q);
  if constexpr (C::kLloyd) {
    if (has_levels(stage.format()) && block.base != 0) {
      auto& turned = tables.turned[Team<C>::of_cta() * C::kWarps + Team<C>::warp()];
#pragma unroll
      for (int chunk = 0; chunk < C::kDim / 64; ++chunk) {
        const QueryPair<C::kDim> pair(q, chunk, block.base, lane);
        turned[chunk * 32 + lane.index] = joined(pair.low);
        turned[(chunk + C::kDim / 64) * 32 + lane.index] = joined(pair.high);
      }
      q = shared_address(turned);
    }
  }
  if constexpr (!C::kLloyd) {
    return turned_scores<AngleKind::kAny>(shared, tables, call, lane, s, stage, data, q, block);
  }
  switch (block.kind) {
    case AngleKind::kSteps:
      return turned_scores<AngleKind::kSteps>(shared, tables, call, lane, s, stage, data, q, block);
    case AngleKind::kStrides:
      return turned_scores<AngleKind::kStrides>(shared, tables, call, lane, s, stage, data, q,
                                                block);
    default:
      return turned_scores<AngleKind::kTable>(shared, tables, call, lane, s, stage, data, q, block);
  }
}

template <typename C>
__device__ void stage_scores(Shared<C>& shared, Tables<C>& tables, const DecodeCall& call,
                             const Lane& lane, Softmax<C::kDim>& s, const Stage& stage,
                             std::uint32_t data) {
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
  if constexpr (C::kBeforeRope) scores_before_rope(shared, tables, call, lane, s, stage, data);
}

template <typename C>
__device__ void stage_values(Tables<C>& tables, Softmax<C::kDim>& s, const Stage& stage,
                             std::uint32_t data, const Lane& lane) {
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
    const LevelLookup<C::kLevelTable> levels(shared_address(&tables.levels));
    switch (format) {
      case KvFormat::kLloyd1:
        return lloyd_values<1>(s, data, levels, lane);
      case KvFormat::kLloyd2:
        return lloyd_values<2>(s, data, levels, lane);
      case KvFormat::kLloyd3:
        return lloyd_values<3>(s, data, levels, lane);
      case KvFormat::kLloyd4:
        return lloyd_values<4>(s, data, levels, lane);
      default:
        break;
    }
  }
  if constexpr (C::kRows) {
    row_values(s, data, stage.part(), format == KvFormat::kCodebook, lane);
  }
}

// The units `first`, first + kWarps .. below `end` of the entry by a warp that copies for itself.
// The first rounds only issue stages; the team prepares the queries while they are under way.
template <typename C>
__device__ void run_stages(Shared<C>& shared, Tables<C>& tables, const DecodeCall& call,
                           Softmax<C::kDim>& s, int first, int end) {
  const int warp = Team<C>::warp();
  Pipe<C> pipe{.call = call,
               .entry = &shared.entry,
               .stages = shared.stream.stages[warp],
               .ring = shared_address(shared.ring[warp]),
               .descriptors = shared_address(shared.stream.descriptors[warp]),
               .lane = {},
               .first_unit = first,
               .n_units = end > first ? (end - first + C::kWarps - 1) / C::kWarps : 0};
  pipe.start();
  std::uint32_t slot = 0;
  for (int i = -C::kStages;; ++i) {
    Stage stage = {};
    if (i == 0) prepare(shared, call);
    if (i >= 0) {
      if (i >= pipe.n_issued) break;
      wait_copies<C::kStages - 1>();
      __syncwarp();
      stage = pipe.listed(i);
      const std::uint32_t data = pipe.ring + slot;
      if (stage.is_key()) {
        stage_scores(shared, tables, call, pipe.lane, s, stage, data);
      } else {
        if constexpr (C::kHadamard) s.change_basis(basis_of(stage.format()), pipe.lane);
        stage_values(tables, s, stage, data, pipe.lane);
      }
      slot = pipe.next_slot(slot);
      __syncwarp();
    }
    pipe.issue();
    if (stage.is_last_key()) s.template step<C::kInt4, C::kLloyd>(stage, pipe.lane, call.scale);
  }
  wait_copies<0>();
  __syncwarp();
  if constexpr (C::kHadamard) s.change_basis(Basis::kPlain, pipe.lane);
}

// The warp's units by one that is fed.
template <typename C>
__device__ void run_fed_stages(Shared<C>& shared, Tables<C>& tables, const DecodeCall& call,
                               Softmax<C::kDim>& s, Feed<C>& feed) {
  prepare(shared, call);
  const Lane lane;
  const std::uint32_t ring = shared_address(shared.ring[Team<C>::warp()]);
  for (;;) {
    Stage stage = feed.wait();
    const bool is_over = stage.bits == Stage::kOver;
    std::uint32_t data = ring + feed.slot() * C::kStageBytes;
    const bool has_values = is_over || !stage.is_key() || stage.is_both();
    if (!is_over) {
      if (is_elements(stage.format()) && stage.capacity() != kKvBlockTokens) {
        copy_elements<C::kDim>(data, place_of(call, stage.codes), stage, lane);
        commit_copies();
        wait_copies<0>();
        fence_async_proxy();
        __syncwarp();
      }
      if (stage.is_key()) stage_scores(shared, tables, call, lane, s, stage, data);
      if (stage.is_last_key()) s.template step<C::kInt4, C::kLloyd>(stage, lane, call.scale);
    }
    if (has_values) {
      if (!is_over && stage.is_both()) {
        stage = stage.values();
        data += C::kValueOffset;
      }
      s.change_basis(is_over ? Basis::kPlain : basis_of(stage.format()), lane);
      if (!is_over) stage_values(tables, s, stage, data, lane);
    }
    feed.release();
    if (is_over) return;
  }
}

template <typename C>
__device__ void run_segment(Shared<C>& shared, Tables<C>& tables, const DecodePlan& plan,
                            const DecodeCall& call, const Segment& segment, FeedOf<C>& feed) {
  constexpr int kDim = C::kDim;
  const int warp = Team<C>::warp();
  Softmax<kDim> s;
  s.start();
  if constexpr (C::kFed) {
    run_fed_stages(shared, tables, call, s, feed);
  } else {
    run_stages(shared, tables, call, s, segment.begin + warp, segment.end);
  }
  const Lane lane;
  const std::uint32_t v_mean = shared.entry.head.v_mean;
  s.finish(lane, v_mean == kNoPlace
                     ? nullptr
                     : reinterpret_cast<const std::uint16_t*>(place_of(call, v_mean)));

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
  Team<C>::sync();
  float* partial = plan.partials + (std::int64_t{Team<C>::of_grid()} * 2 + segment.slot) *
                                       decode_partial_floats(kDim);
  write_segment(shared, call, segment, partial);
  if (segment.whole) return;
  Team<C>::sync();
  if (Team<C>::thread() == 0) {
    // Fences of one thread are enough: the team's barriers order the others' accesses around it.
    __threadfence();
    const auto last = static_cast<std::uint32_t>(shared.entry.last_part - shared.entry.first_part);
    shared.is_last = atomicAdd(plan.arrivals + segment.entry, 1U) == last;
    if (shared.is_last != 0) plan.arrivals[segment.entry] = 0;
    __threadfence();
  }
  Team<C>::sync();
  if (shared.is_last == 0) return;
  merge_parts(shared, plan, call);
}

// All segments of the team's share, one after the other: run(segment, entry). Those who compute have
// the entry in shared memory; a feeding warp has a copy of its own, since it is ahead of them.
template <typename C, bool kFeeds, typename F>
__device__ void for_each_segment(Shared<C>& shared, const DecodePlan& plan, const DecodeCall& call,
                                 const F& run) {
  const int team = Team<C>::of_grid();
  if (team >= plan.n_teams) return;
  const std::int64_t* shares = plan.shares + std::int64_t{call.layer} * (plan.n_teams + 1);
  const std::int64_t begin = shares[team];
  const std::int64_t end = shares[team + 1];
  int index = plan.first_entry[std::int64_t{call.layer} * plan.n_teams + team];
  if (begin == end) return;
  const DecodeEntry* entries = plan.entries + std::int64_t{call.layer} * plan.max_entries;
  for (std::int64_t at = begin; at < end; ++index) {
    // What the last segment wrote into the ring comes before what is copied there next.
    if constexpr (C::kFed) fence_async_proxy();
    Team<C>::sync_all();
    DecodeEntry* copy = &shared.entry;
    int thread = Team<C>::thread();
    if constexpr (kFeeds) {
      copy = &shared.stream.entry;
      thread %= 32;
    }
    if (thread < static_cast<int>(sizeof(DecodeEntry) / sizeof(uint4))) {
      reinterpret_cast<uint4*>(copy)[thread] =
          reinterpret_cast<const uint4*>(entries + index)[thread];
    }
    if constexpr (kFeeds) {
      __syncwarp();
    } else {
      Team<C>::sync();
    }
    const DecodeEntry& entry = *copy;
    if (entry.begin == entry.end) continue;
    const std::int64_t stop = end < entry.end ? end : entry.end;
    run(Segment{index, unit_at(entry, at - entry.begin), unit_at(entry, stop - entry.begin),
                entry.first_part == entry.last_part, at > begin ? 1 : 0},
        entry);
    at = stop;
  }
}

template <typename C>
__device__ void decode(const DecodePlan& plan, const DecodeCall& call) {
  extern __shared__ std::byte dynamic_shared[];
  auto& of_cta = *reinterpret_cast<CtaShared<C>*>(dynamic_shared);
  Tables<C>& tables = of_cta.tables;
  Shared<C>& shared = of_cta.teams[Team<C>::of_cta()];
  if constexpr (C::kLevelTable) fill_level_pairs(tables.levels);
  if constexpr (C::kBeforeRope) {
    if (call.rope_cos != nullptr) fill_angles(tables.steps, tables.strides, call);
  }
  if constexpr (C::kFed) init_feed(shared.stream);
  if constexpr (C::kLevelTable) {
    if (shared_address(&tables.levels) % sizeof(LevelPairs) != 0) __trap();
  }
  __syncthreads();
  if constexpr (C::kFed) {
    if (Team<C>::thread() >= C::kThreads) {
      Feeder<C> feeder(shared.stream, shared.ring[0], call);
      for_each_segment<C, true>(
          shared, plan, call, [&](const Segment& segment, const DecodeEntry& entry) {
            feeder.run(entry, segment.begin, segment.end);
          });
    } else {
      Feed<C> feed(shared.stream, Team<C>::warp());
      for_each_segment<C, false>(shared, plan, call, [&](const Segment& segment, const auto&) {
        run_segment(shared, tables, plan, call, segment, feed);
      });
    }
  } else {
    Nothing none;
    for_each_segment<C, false>(shared, plan, call, [&](const Segment& segment, const auto&) {
      run_segment(shared, tables, plan, call, segment, none);
    });
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kTeamThreads* C::kTeams, kTeamsPerMultiprocessor / C::kTeams)
    decode_kernel(const __grid_constant__ DecodePlan plan,
                  const __grid_constant__ DecodeCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  decode<C>(plan, call);
#else
  if constexpr (!C::kFed) decode<C>(plan, call);
#endif
}

template <typename C>
int allow_and_count() {
  constexpr int kBytes = static_cast<int>(sizeof(CtaShared<C>));
  constexpr int kCtas = kTeamsPerMultiprocessor / C::kTeams;
  // All sets run on one grid: one that does not fit twice would halve the grid of the others.
  static_assert(kCtas * (kBytes + 1024) <= kSharedBytesPerMultiprocessor);
  cuda_check(
      cudaFuncSetAttribute(decode_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "shared memory of attention_decode");
  int n = 0;
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, decode_kernel<C>,
                                                           C::kTeamThreads * C::kTeams, kBytes),
             "occupancy of attention_decode");
  return n * C::kTeams;
}

template <DecodeFormats kFormats, bool kFed = false>
int teams_per_multiprocessor(int head_dim) {
  if (head_dim == 64) {
    return min(allow_and_count<Config<64, false, kFormats, kFed>>(),
               allow_and_count<Config<64, true, kFormats, kFed>>());
  }
  return min(allow_and_count<Config<128, false, kFormats, kFed>>(),
             allow_and_count<Config<128, true, kFormats, kFed>>());
}

template <typename C>
void launch(cudaStream_t stream, const DecodePlan& plan, const DecodeCall& call) {
  decode_kernel<C><<<(plan.n_teams + C::kTeams - 1) / C::kTeams, C::kTeamThreads * C::kTeams,
                     sizeof(CtaShared<C>), stream>>>(plan, call);
}

template <DecodeFormats kFormats, bool kFed = false>
void launch_formats(CUstream_st* stream, const DecodePlan& plan, const DecodeCall& call) {
  const bool is_bf16 = call.dtype == DType::kBF16;
  if (call.head_dim == 64) {
    is_bf16 ? launch<Config<64, true, kFormats, kFed>>(stream, plan, call)
            : launch<Config<64, false, kFormats, kFed>>(stream, plan, call);
  } else {
    is_bf16 ? launch<Config<128, true, kFormats, kFed>>(stream, plan, call)
            : launch<Config<128, false, kFormats, kFed>>(stream, plan, call);
  }
  check_launch("attention_decode");
}

}  // namespace spindle::kernels::device
