#pragma once
// Decode attention: split-KV over a grid that fills the device once. kernels/cuda/decode_plan.cuh
// says how the work is cut, decode_pipe.cuh and decode_stream.cuh how data comes in,
// decode_softmax.cuh what a warp holds.
//
// A share of the work is done by a team: a CTA, or half of one where two teams share tables. Its
// warps take the units of a segment (a range of units of one entry) round robin, each with a
// softmax of its own, and merge at the segment's end. A segment that is a whole entry is written
// out. Parts of an entry go to the team's slots, and the team that arrives last merges them.

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/decode_int4.cuh"
#include "kernels/cuda/decode_kivi.cuh"
#include "kernels/cuda/decode_launch.h"
#include "kernels/cuda/decode_lloyd.cuh"
#include "kernels/cuda/decode_merge.cuh"
#include "kernels/cuda/decode_queries.cuh"
#include "kernels/cuda/decode_raw.cuh"
#include "kernels/cuda/decode_row_units.cuh"
#include "kernels/cuda/decode_rows.cuh"
#include "kernels/cuda/decode_team.cuh"

namespace spindle::kernels::device {

// The warp's turned query tile.
template <typename C>
__device__ TurnedQuery<C::kDim, C::kLevelTable> turned_query(CtaShared<C>& cta, const Lane& lane,
                                                             bool is_half = false) {
  using Turned = TurnedQuery<C::kDim, C::kLevelTable>;
  const int warp = Team<C>::of_cta() * C::kWarps + Team<C>::warp();
  if constexpr (C::kLevelTable) {
    return {shared_place(cta, cta.levels.rows[0].other) + warp * Turned::kTileBytes, lane, is_half};
  } else {
    return {shared_address(cta.tables.turned[warp]), lane, is_half};
  }
}
template <typename C>
__device__ LevelLookup<C::kLevelTable> level_lookup(CtaShared<C>& cta) {
  return LevelLookup<C::kLevelTable>(shared_place(cta, &cta.levels));
}

// Scores of levels by the query tile turned back as `block` says. They are compiled per kind of
// angles: a branch at every angle would keep loads from being overlapped.
template <AngleKind kKind, typename C>
__device__ void level_scores(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                             const Lane& lane, Softmax<C::kDim>& s, KvFormat format,
                             std::uint32_t data, const BlockAngles& block) {
  const std::uint32_t k_mean = shared_place(cta, shared.k_mean);
  const auto q = turned_query(cta, lane);
  const auto levels = level_lookup(cta);
  switch (format) {
    case KvFormat::kLloyd1:
      return lloyd_scores<1, kKind>(s, data, q, k_mean, block, levels, call, lane);
    case KvFormat::kLloyd2:
      return lloyd_scores<2, kKind>(s, data, q, k_mean, block, levels, call, lane);
    case KvFormat::kLloyd3:
      return lloyd_scores<3, kKind>(s, data, q, k_mean, block, levels, call, lane);
    default:
      return lloyd_scores<4, kKind>(s, data, q, k_mean, block, levels, call, lane);
  }
}

template <typename C>
__device__ BlockAngles angles_of(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                                 const Lane& lane, const Stage& stage, std::uint32_t data,
                                 bool is_listed) {
  return block_angles<C::kDim>(
      stage, data + C::kRopeOffset, is_listed, shared.entry.head.wide_positions != 0,
      shared_place(cta, &cta.tables.steps), shared_place(cta, &cta.tables.strides),
      C::kLevelTable ? C::kStepRows : 0, call.max_positions, lane);
}

// The queries are turned back to the block's base position, keys by their steps from there.
template <typename C>
__device__ void scores_before_rope(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                                   const Lane& lane, Softmax<C::kDim>& s, const Stage& stage,
                                   std::uint32_t data) {
  const BlockAngles block = angles_of(shared, cta, call, lane, stage, data, stage.is_listed());
  const std::uint32_t q = shared_place(cta, shared.q);
  const KvFormat format = stage.format();
  if constexpr (C::kLloyd) {
    if (has_levels(format)) {
      turned_query(cta, lane).turn(q, block.base, lane);
      switch (block.kind) {
        case AngleKind::kSteps:
          return level_scores<AngleKind::kSteps>(shared, cta, call, lane, s, format, data, block);
        case AngleKind::kListedSteps:
        case AngleKind::kStrides:
          return level_scores<AngleKind::kStrides>(shared, cta, call, lane, s, format, data, block);
        default:
          return level_scores<AngleKind::kTable>(shared, cta, call, lane, s, format, data, block);
      }
    }
  }
  if constexpr (C::kRows) {
    row_scores<AngleKind::kAny>(s, data, stage.part(), q, block, format == KvFormat::kCodebook,
                                call, lane);
  }
}

template <typename C>
__device__ void stage_scores(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
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
  if constexpr (C::kBeforeRope) scores_before_rope(shared, cta, call, lane, s, stage, data);
}

template <typename C>
__device__ void stage_values(CtaShared<C>& cta, Softmax<C::kDim>& s, const Stage& stage,
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
    if (has_levels(format)) {
      s.add_centred();
      const auto levels = level_lookup(cta);
      switch (format) {
        case KvFormat::kLloyd1:
          return lloyd_values<1>(s, data, levels, lane);
        case KvFormat::kLloyd2:
          return lloyd_values<2>(s, data, levels, lane);
        case KvFormat::kLloyd3:
          return lloyd_values<3>(s, data, levels, lane);
        default:
          return lloyd_values<4>(s, data, levels, lane);
      }
    }
  }
  if constexpr (C::kRows) {
    row_values(s, data, stage.part(), format == KvFormat::kCodebook, lane);
  }
}

// The units `first`, first + kWarps .. below `end` of the entry by a warp that copies for itself.
// The first rounds only issue stages; the team prepares the queries while they are under way.
template <typename C>
__device__ void run_stages(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                           Softmax<C::kDim>& s, int first, int end) {
  const int warp = Team<C>::warp();
  Pipe<C> pipe{.call = call,
               .entry = &shared.entry,
               .stages = shared.stream.stages[warp],
               .ring = shared_address(cta.ring(0, warp)),
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
        stage_scores(shared, cta, call, pipe.lane, s, stage, data);
      } else {
        if constexpr (C::kHadamard) s.change_basis(basis_of(stage.format()), pipe.lane);
        stage_values(cta, s, stage, data, pipe.lane);
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

// A stage of any kind. Apart from the loop below, so that what is rare costs neither registers nor
// instruction cache.
template <typename C>
__device__ __noinline__ void run_any_stage(Shared<C>& shared, CtaShared<C>& cta,
                                           const DecodeCall& call, Softmax<C::kDim>& s, Stage stage,
                                           std::uint32_t data) {
  const Lane lane;
  if (stage.is_key()) stage_scores(shared, cta, call, lane, s, stage, data);
  if (stage.is_last_key()) s.template step<C::kInt4, C::kLloyd>(stage, lane, call.scale);
  if (stage.is_both()) {
    stage = stage.values();
    data += C::kValueOffset;
  }
  if (!stage.is_key()) stage_values(cta, s, stage, data, lane);
}

// A run of complete blocks of levels, from the current stage to the first that is of another kind
// or whose angles are; false: already the current one is.
template <int kKeyBits, int kValueBits, AngleKind kKind, typename C>
__device__ bool run_levels(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                           Softmax<C::kDim>& s, LevelStream<C>& stream) {
  constexpr bool kListed = kKind != AngleKind::kSteps;
  const Lane lane;
  const bool is_half = shared.entry.n_heads <= kDecodeTileHeads / 2;
  const auto turned = turned_query(cta, lane, is_half);
  const auto levels = level_lookup(cta);
  const std::uint32_t q = shared_place(cta, shared.q);
  const std::uint32_t k_mean = shared_place(cta, shared.k_mean);
  const auto earlier = s.begin_run();
  bool ran = false;
  do {
    stream.wait();
    const std::uint32_t data = stream.data();
    BlockAngles block{kKind, shared_place(cta, &cta.tables.steps), 0, data + C::kRopeOffset, {}};
    if constexpr (kKind == AngleKind::kListedSteps) {
      if (!find_listed_steps<C::kDim, C::kStepRows>(
              block.at, block.base + 4 * C::kDim, shared.entry.head.wide_positions != 0,
              stream.stage().first_position, block.steps, lane)) {
        break;
      }
    } else if constexpr (kListed) {
      block = angles_of(shared, cta, call, lane, stream.stage(), data, true);
      if (block.kind != kKind) break;
    }
    is_half ? turned.turn_half(q, block.base, lane) : turned.turn(q, block.base, lane);
    lloyd_scores<kKeyBits, kKind>(s, data, turned, k_mean, block, levels, call, lane);
    s.template step_visible<false, false>(call.scale);
    const ValueWeights weights(s.weights, data + C::kValueOffset + 4 * kValueBits * C::kDim, lane);
    const LevelWords<kValueBits, C::kDim> words(data + C::kValueOffset, lane);
    stream.template go_on_run<kKeyBits, kValueBits, kListed>();
    words.add(s, weights, levels);
    ran = true;
  } while (stream.stage().bits == run_bits<kKeyBits, kValueBits>(kListed));
  s.end_centred_run(earlier);
  return ran;
}

// The same of listed blocks, with either kind of angles.
template <int kKeyBits, int kValueBits, typename C>
__device__ bool run_listed_levels(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                                  Softmax<C::kDim>& s, LevelStream<C>& stream) {
  return run_levels<kKeyBits, kValueBits, AngleKind::kListedSteps>(shared, cta, call, s, stream) ||
         run_levels<kKeyBits, kValueBits, AngleKind::kStrides>(shared, cta, call, s, stream);
}

// The units `first`, first + kWarps .. below `end` of the entry by a warp with a stream of levels.
template <typename C>
__device__ void run_level_stages(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                                 Softmax<C::kDim>& s, int first, int end) {
  const Lane lane;
  const int warp = Team<C>::warp();
  StreamRecord* record = &shared.stream.records[warp];
  LevelStream<C> stream(call, shared.entry, record, shared_place(cta, record),
                        shared_place(cta, cta.ring(Team<C>::of_cta(), warp)), first, end);
  prepare(shared, call);
  for (;;) {
    const Stage stage = stream.stage();
    const bool is_over = stage.bits == Stage::kOver;
    const bool is_raw = !is_over && stage.format() == KvFormat::kRaw;
    Basis basis = Basis::kHadamard;
    if (is_over || is_raw) basis = !is_over && stage.is_key() ? s.basis : Basis::kPlain;
    s.change_basis(basis, lane);
    if (is_over) break;
    if (is_raw) {
      stream.wait();
      const std::uint32_t data = stream.data();
      if (stage.is_key()) {
        raw_scores<C::kDim, C::kBf16>(s, data, stage.part(), shared_place(cta, shared.q), lane);
        if (stage.is_last_key()) s.template step<C::kInt4, C::kLloyd>(stage, lane, call.scale);
      } else {
        raw_values<C::kDim, C::kBf16>(s, data, stage, lane);
      }
      stream.go_on();
      continue;
    }
    bool ran = false;
    switch (stage.bits) {
      case run_bits<4, 4>(false):
        ran = run_levels<4, 4, AngleKind::kSteps>(shared, cta, call, s, stream);
        break;
      case run_bits<4, 4>(true):
        ran = run_listed_levels<4, 4>(shared, cta, call, s, stream);
        break;
      case run_bits<3, 2>(false):
        ran = run_levels<3, 2, AngleKind::kSteps>(shared, cta, call, s, stream);
        break;
      case run_bits<3, 2>(true):
        ran = run_listed_levels<3, 2>(shared, cta, call, s, stream);
        break;
      default:
        break;
    }
    if (ran) continue;
    stream.wait();
    Softmax<C::kDim> copy = s;
    run_any_stage(shared, cta, call, copy, stage, stream.data());
    s = copy;
    stream.go_on();
  }
  wait_copies<0>();
  __syncwarp();
}

// The part of the share that is in shared.entry.
template <typename C>
__device__ void run_segment(Shared<C>& shared, CtaShared<C>& cta, const DecodePlan& plan,
                            const DecodeCall& call) {
  constexpr int kDim = C::kDim;
  const int warp = Team<C>::warp();
  Softmax<kDim> s;
  s.start();
  const DecodeEntry& entry = shared.entry;
  const DecodeShare& share = shared.share;
  const int first = unit_at(entry, max(share.begin, entry.begin) - entry.begin) + warp;
  const int end = unit_at(entry, min(share.end, entry.end) - entry.begin);
  if constexpr (C::kLevelTable) {
    run_level_stages(shared, cta, call, s, first, end);
  } else if constexpr (C::kRowStream) {
    run_row_stages(shared, cta, call, s, first, end);
  } else {
    run_stages(shared, cta, call, s, first, end);
  }
  const Lane lane;
  const std::uint32_t v_mean = entry.head.v_mean;
  s.finish(lane, v_mean == kNoPlace
                     ? nullptr
                     : reinterpret_cast<const std::uint16_t*>(place_of(call, v_mean)));

  auto* sums = reinterpret_cast<float*>(cta.ring(Team<C>::of_cta(), warp));
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
  // A team has two slots, for the entry that its share begins in and for the one that it ends in.
  const int slot = 2 * Team<C>::of_grid() + (share.begin < entry.begin ? 1 : 0);
  write_segment(cta, shared, call,
                plan.partials + std::int64_t{slot} * decode_partial_floats(kDim));
  if (entry.first_part == entry.last_part) return;
  Team<C>::sync();
  if (Team<C>::thread() == 0) {
    // Fences of one thread are enough: the team's barriers order the others' accesses around it.
    __threadfence();
    const auto last = static_cast<std::uint32_t>(entry.last_part - entry.first_part);
    std::uint32_t* arrivals = plan.arrivals + share.entry;
    shared.is_last = atomicAdd(arrivals, 1U) == last;
    if (shared.is_last != 0) *arrivals = 0;
    __threadfence();
  }
  Team<C>::sync();
  if (shared.is_last == 0) return;
  merge_parts(shared, plan, call);
}

// The team's share, segment by segment. What is kept from one to the next is in shared memory,
// since registers are scarce. The first entry comes with the share, and each one's successor while
// it is worked on.
template <typename C>
__device__ void run_share(Shared<C>& shared, CtaShared<C>& cta, const DecodePlan& plan,
                          const DecodeCall& call) {
  constexpr int kPieces = sizeof(DecodeEntry) / sizeof(uint4);
  constexpr int kHeadPieces = offsetof(DecodeShare, first) / sizeof(uint4);
  const int team = Team<C>::of_grid();
  if (team >= plan.n_teams) return;
  const int thread = Team<C>::thread();
  const auto* from =
      reinterpret_cast<const uint4*>(plan.shares + std::int64_t{call.layer} * plan.n_teams + team);
  if (thread < kHeadPieces) {
    reinterpret_cast<uint4*>(&shared.share)[thread] = from[thread];
  } else if (thread < kHeadPieces + kPieces) {
    reinterpret_cast<uint4*>(&shared.entry)[thread - kHeadPieces] = from[thread];
  }
  Team<C>::sync();
  if (shared.share.begin == shared.share.end) return;
  for (;;) {
    if (shared.entry.end < shared.share.end && thread < kPieces) {
      const DecodeEntry* entries = plan.entries + std::int64_t{call.layer} * plan.max_entries;
      copy_16(shared_address(&shared.next_entry) + 16 * thread,
              reinterpret_cast<const std::byte*>(entries + shared.share.entry + 1) + 16 * thread);
    }
    commit_copies();
    if (shared.entry.begin < shared.entry.end) run_segment(shared, cta, plan, call);
    if (shared.entry.end >= shared.share.end) return;
    wait_copies<0>();
    Team<C>::sync();
    if (thread < kPieces) {
      reinterpret_cast<uint4*>(&shared.entry)[thread] =
          reinterpret_cast<const uint4*>(&shared.next_entry)[thread];
    }
    if (thread == 0) ++shared.share.entry;
    Team<C>::sync();
  }
}

template <typename C>
__device__ void decode(const DecodePlan& plan, const DecodeCall& call) {
  extern __shared__ std::byte dynamic_shared[];
  auto& cta = *reinterpret_cast<CtaShared<C>*>(dynamic_shared);
  Tables<C>& tables = cta.tables;
  Shared<C>& shared = cta.teams[Team<C>::of_cta()];
  if constexpr (C::kLevelTable) {
    if (shared_address(&cta) != kSystemSharedBytes) __trap();
    fill_level_pairs(cta.levels);
  }
  if constexpr (C::kBeforeRope) {
    if (call.rope_cos != nullptr) fill_angles<C::kRowStream>(tables.steps, tables.strides, call);
  }
  let_next_kernel_start();
  // Angles are constants like weights; all else may be what an earlier kernel wrote.
  wait_for_previous_kernel();
  __syncthreads();
  run_share(shared, cta, plan, call);
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads* C::kTeams, kTeamsPerMultiprocessor / C::kTeams)
    decode_kernel(const __grid_constant__ DecodePlan plan,
                  const __grid_constant__ DecodeCall call) {
#if __CUDA_ARCH__ >= 900
  decode<C>(plan, call);
#else
  if constexpr (!C::kLevelTable) decode<C>(plan, call);
#endif
}

template <typename C>
int allow_and_count() {
  constexpr int kBytes = static_cast<int>(sizeof(CtaShared<C>));
  constexpr int kCtas = kTeamsPerMultiprocessor / C::kTeams;
  if constexpr (C::kLevelTable) {
    static_assert(offsetof(CtaShared<C>, levels) == CtaShared<C>::kTableOffset);
  }
  // All sets run on one grid: one that does not fit twice would halve the grid of the others.
  static_assert(kCtas * (kBytes + 1024) <= kSharedBytesPerMultiprocessor);
  cuda_check(
      cudaFuncSetAttribute(decode_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "shared memory of attention_decode");
  int n = 0;
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, decode_kernel<C>,
                                                           C::kThreads * C::kTeams, kBytes),
             "occupancy of attention_decode");
  return n * C::kTeams;
}

template <DecodeFormats kFormats, bool kLevelTable = false>
int teams_per_multiprocessor(int head_dim) {
  if (head_dim == 64) {
    return min(allow_and_count<Config<64, false, kFormats, kLevelTable>>(),
               allow_and_count<Config<64, true, kFormats, kLevelTable>>());
  }
  return min(allow_and_count<Config<128, false, kFormats, kLevelTable>>(),
             allow_and_count<Config<128, true, kFormats, kLevelTable>>());
}

template <typename C>
void launch(const CudaContext& context, const DecodePlan& plan, const DecodeCall& call) {
  launch_chained(context, "attention_decode", decode_kernel<C>,
                 dim3(static_cast<unsigned>((plan.n_teams + C::kTeams - 1) / C::kTeams)),
                 dim3(C::kThreads * C::kTeams), sizeof(CtaShared<C>), plan, call);
}

template <DecodeFormats kFormats, bool kLevelTable = false>
void launch_formats(const CudaContext& context, const DecodePlan& plan, const DecodeCall& call) {
  const bool is_bf16 = call.dtype == DType::kBF16;
  if (call.head_dim == 64) {
    is_bf16 ? launch<Config<64, true, kFormats, kLevelTable>>(context, plan, call)
            : launch<Config<64, false, kFormats, kLevelTable>>(context, plan, call);
  } else {
    is_bf16 ? launch<Config<128, true, kFormats, kLevelTable>>(context, plan, call)
            : launch<Config<128, false, kFormats, kLevelTable>>(context, plan, call);
  }
}

}  // namespace spindle::kernels::device
