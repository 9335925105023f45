#pragma once
// Who works together in decode attention, and what lies in shared memory for whom.

#include <cstddef>
#include <type_traits>

#include "kernels/cuda/decode_levels.cuh"
#include "kernels/cuda/decode_pipe.cuh"
#include "kernels/cuda/decode_rope.cuh"
#include "kernels/cuda/decode_row_stream.cuh"
#include "kernels/cuda/decode_stream.cuh"

namespace spindle::kernels::device {

struct Nothing {};
template <bool kUsed, typename T>
using If = std::conditional_t<kUsed, T, Nothing>;

// The threads that work on one share of the plan: a CTA, or one of two in a CTA with common tables.
template <typename C>
struct Team {
  __device__ static int of_cta() { return static_cast<int>(threadIdx.x) / C::kThreads; }
  __device__ static int of_grid() { return static_cast<int>(blockIdx.x) * C::kTeams + of_cta(); }
  __device__ static int thread() { return static_cast<int>(threadIdx.x) % C::kThreads; }
  __device__ static int warp() { return thread() / 32; }
  // The team's threads meet.
  __device__ static void sync() {
    if constexpr (C::kTeams == 1) {
      __syncthreads();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + of_cta()), "n"(C::kThreads) : "memory");
    }
  }
};

// What the teams of a CTA share: tables that are computed once.
template <typename C>
struct alignas(128) Tables {
  // Query tiles turned back by each warp, fragments of load_query(); with a table of levels they
  // lie in the second halves of its rows.
  static constexpr bool kTurned = C::kLloyd && !C::kLevelTable;

  If<kTurned, uint4[C::kTeams * C::kWarps][C::kDim]> turned;
  If<C::kBeforeRope, AngleTable<C::kDim, C::kStepRows>> steps;
  If<C::kBeforeRope, AngleTable<C::kDim>> strides;
};

// What the warps of a team need for their pipes, or for their streams.
template <typename C>
struct PipeShared {
  alignas(16) DeviceKvBlock descriptors[C::kWarps][kDescriptors];
  Stage stages[C::kWarps][kListedStages];
};

template <typename C>
struct StreamShared {
  std::conditional_t<C::kRowStream, RowRecord, StreamRecord> records[C::kWarps];
};

// What a team has for itself.
template <typename C>
struct alignas(128) Shared {
  static constexpr int kDim = C::kDim;
  static constexpr int kRowFloats = kDim + 4;  // so that 8 rows' channels lie in different banks

  std::conditional_t<C::kLevelTable || C::kRowStream, StreamShared<C>, PipeShared<C>> stream;
  uint4 q[kDim / 32 * 32];                          // fragments of load_query()
  uint4 q_hadamard[C::kInt4 ? kDim / 32 * 32 : 1];  // as nibble_products() wants it
  uint4 k_mean[kDim / 32 * 4];                      // as lloyd_keys() wants it
  DecodeEntry entry;                                // of the current segment
  DecodeEntry next_entry;                           // behind it, on its way
  DecodeShare share;  // `entry` in it is the number of the current one
  int number;         // of the share
  float best[C::kWarps][kDecodeTileHeads];
  float mass[C::kWarps][kDecodeTileHeads];
  float q_sums[kDecodeTileHeads];
  int is_last;
};

// A warp's stages, and what lies beside them; at a segment's end its sums, [8][kRowFloats].
template <typename C>
struct Ring {
  std::byte bytes[C::kStages * C::kStageBytes + 2 * C::kBesideBytes];

  static_assert(sizeof(bytes) >= sizeof(float) * kDecodeTileHeads * Shared<C>::kRowFloats);
};

// Around a table of levels, whose place is fixed, lie as many rings as fit before it, and the rest
// behind it. Dynamic shared memory begins behind what the system takes.
template <typename C>
struct CtaShared {
  static constexpr int kRings = C::kTeams * C::kWarps;
  static constexpr std::size_t kTableOffset = sizeof(LevelPairs) - kSystemSharedBytes;
  static constexpr std::size_t kOthers = sizeof(Tables<C>) + C::kTeams * sizeof(Shared<C>);
  static constexpr int kLowRings =
      C::kLevelTable ? static_cast<int>((kTableOffset - kOthers) / sizeof(Ring<C>)) : kRings;
  static constexpr std::size_t kGap =
      kTableOffset - kOthers - (C::kLevelTable ? kLowRings : 0) * sizeof(Ring<C>);
  static_assert(!C::kLevelTable || (kLowRings > 0 && kLowRings < kRings && kGap > 0));
  // The second halves of the table's rows hold a turned query tile of 32 kDim bytes for each warp.
  static_assert(!C::kLevelTable || kRings * 32 * C::kDim <= static_cast<int>(sizeof(LevelPairs)));

  Tables<C> tables;
  Shared<C> teams[C::kTeams];
  Ring<C> low_rings[kLowRings];
  If<C::kLevelTable, std::byte[C::kLevelTable ? kGap : 1]> gap;
  If<C::kLevelTable, LevelPairs> levels;
  If<C::kLevelTable, Ring<C>[C::kLevelTable ? kRings - kLowRings : 1]> high_rings;

  // Of a warp of a team.
  __device__ std::byte* ring(int team, int warp) {
    const int i = team * C::kWarps + warp;
    if constexpr (C::kLevelTable) {
      if (i >= kLowRings) return high_rings[i - kLowRings].bytes;
    }
    return low_rings[i].bytes;
  }
};

// The shared address of something in the CTA's memory. With a table of levels, whose place must be
// known anyway, it is a constant, which takes no register.
template <typename C>
__device__ std::uint32_t shared_place(const CtaShared<C>& cta, const void* p) {
  if constexpr (!C::kLevelTable) return shared_address(p);
  return static_cast<std::uint32_t>(kSystemSharedBytes) +
         static_cast<std::uint32_t>(static_cast<const char*>(p) -
                                    reinterpret_cast<const char*>(&cta));
}

}  // namespace spindle::kernels::device
