#pragma once
// Who works together in decode attention, and what lies in shared memory for whom.

#include <cstddef>
#include <type_traits>

#include "kernels/cuda/decode_feed.cuh"
#include "kernels/cuda/decode_levels.cuh"
#include "kernels/cuda/decode_pipe.cuh"
#include "kernels/cuda/decode_rope.cuh"

namespace spindle::kernels::device {

struct Nothing {};

// The threads that work on one share of the plan: a CTA, or one of two in a CTA with common tables.
template <typename C>
struct Team {
  __device__ static int of_cta() { return static_cast<int>(threadIdx.x) / C::kTeamThreads; }
  __device__ static int of_grid() { return static_cast<int>(blockIdx.x) * C::kTeams + of_cta(); }
  // Those below kThreads compute, the others feed them.
  __device__ static int thread() { return static_cast<int>(threadIdx.x) % C::kTeamThreads; }
  __device__ static int warp() { return thread() / 32; }
  // The computing threads meet.
  __device__ static void sync() { meet<C::kThreads>(1 + of_cta()); }
  // All threads meet.
  __device__ static void sync_all() { meet<C::kTeamThreads>(1 + C::kTeams + of_cta()); }

 private:
  template <int kCount>
  __device__ static void meet(int barrier) {
    if constexpr (kCount == C::kTeams * C::kTeamThreads) {
      __syncthreads();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kCount) : "memory");
    }
  }
};

// What the teams of a CTA share: tables that are computed once, and places of the warps.
template <typename C>
struct alignas(128) Tables {
  template <bool kUsed, typename T>
  using If = std::conditional_t<kUsed, T, Nothing>;
  static constexpr int kTurned = C::kLloyd ? C::kTeams * C::kWarps : 1;
  static constexpr std::size_t kTurnedBytes = std::size_t{kTurned} * 16 * C::kDim;
  // Dynamic shared memory begins behind what the system takes.
  static constexpr std::size_t kLevelsOffset = sizeof(LevelPairs) - kSystemSharedBytes;
  static_assert(!C::kLevelTable || kTurnedBytes <= kLevelsOffset);

  // Query tiles turned back by each warp, fragments of load_query().
  uint4 turned[kTurned][C::kDim];
  If<C::kLevelTable, std::byte[C::kLevelTable ? kLevelsOffset - kTurnedBytes : 1]> unused;
  If<C::kLevelTable, LevelPairs> levels;
  If<C::kBeforeRope, AngleTable<C::kDim>> steps;
  If<C::kBeforeRope, AngleTable<C::kDim>> strides;
};

// Of a team whose warps copy for themselves.
template <typename C>
struct PipeShared {
  alignas(16) DeviceKvBlock descriptors[C::kWarps][kDescriptors];
  Stage stages[C::kWarps][kListedStages];
};

template <typename C>
using FeedOf = std::conditional_t<C::kFed, Feed<C>, Nothing>;

// What a team has for itself.
template <typename C>
struct alignas(128) Shared {
  static constexpr int kDim = C::kDim;
  static constexpr int kRowFloats = kDim + 4;  // so that 8 rows' channels lie in different banks

  // [warp][stage]; at a segment's end the sums of each warp, [8][kRowFloats].
  std::byte ring[C::kWarps][C::kStages * C::kStageBytes];
  std::conditional_t<C::kFed, FeedShared<C>, PipeShared<C>> stream;
  uint4 q[kDim / 32 * 32];                          // fragments of load_query()
  uint4 q_hadamard[C::kInt4 ? kDim / 32 * 32 : 1];  // as nibble_products() wants it
  uint4 k_mean[kDim / 32 * 4];                      // as lloyd_keys() wants it
  DecodeEntry entry;
  float best[C::kWarps][kDecodeTileHeads];
  float mass[C::kWarps][kDecodeTileHeads];
  float q_sums[kDecodeTileHeads];
  int is_last;

  static_assert(sizeof(ring[0]) >= sizeof(float) * kDecodeTileHeads * kRowFloats);
};

template <typename C>
struct CtaShared {
  Tables<C> tables;
  Shared<C> teams[C::kTeams];
};

}  // namespace spindle::kernels::device
