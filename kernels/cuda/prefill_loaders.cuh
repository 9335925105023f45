#pragma once
// The loading half of the wgmma kernel of prefill attention: what lies where in shared memory, how
// thread blocks get their units of work, and the warps that load for the computing ones.

#include <cuda.h>

#include <climits>
#include <type_traits>

#include "kernels/cuda/prefill_mma.cuh"
#include "kernels/cuda/prefill_wgmma.cuh"
#include "kernels/cuda/prefill_work.cuh"

namespace spindle::kernels::prefill {

inline constexpr int kGroupThreads = 128;
SPINDLE_HOST_DEVICE constexpr int wgmma_threads(int head_dim) {
  return (1 + wgmma_groups(head_dim)) * kGroupThreads;
}
inline constexpr int kQueryThreads = kGroupThreads - 32;
inline constexpr int kGroupRows = 64;
inline constexpr int kStages = 2;
inline constexpr int kStepPages = kWgmmaStepSlots / kPageSlots;
inline constexpr int kRowBytes = 64;

struct WgmmaParams {
  PrefillParams p;
  // Pages as [page][2 head_dim rows][32 elements]: boxes of 32 rows for K, of head_dim for V.
  CUtensorMap k_pool;
  CUtensorMap v_pool;
  CUtensorMap k_expanded;
  CUtensorMap v_expanded;
};
static_assert(sizeof(WgmmaParams) <= 4096);

// What the computing warpgroups need to know of a unit of work.
struct TilePlace {
  int n_steps;  // 0: there is no more work
  int begin;    // first step
  int n_used;   // splits
  int head;
  int query_begin;
  int query_0_slot;  // of the sequence's first query
  int row0;
  int n_rows;       // of the sequence
  int partial_row;  // of row0 in partial results
};

template <int kDim>
struct Smem {
  static constexpr int kPageBytes = kDim * kRowBytes;  // of one side
  static constexpr int kStageBytes = kStepPages * kPageBytes;
  // Queries of heads of 128 go to registers and leave their buffer at once; for heads of 64 there
  // is no room in three warpgroups' registers.
  static constexpr bool kQRegisters = kDim == 128;
  static constexpr int kQBuffers = kQRegisters ? 1 : 2;
  static constexpr int kQ = 0;  // [buffer][warpgroup][kDim / 32][64 rows][64 bytes]
  static constexpr int kQGroupBytes = kGroupRows * kDim * 2;
  static constexpr int kQBytes = wgmma_groups(kDim) * kQGroupBytes;
  static constexpr int kK = kQ + kQBuffers * kQBytes;    // [stage][kDim / 32][128 slots][64 bytes]
  static constexpr int kV = kK + kStages * kStageBytes;  // [stage][page][kDim][64 bytes]
  static constexpr int kBarriers = kV + kStages * kStageBytes;
  static constexpr int kMasks = kBarriers + 8 * (4 * kStages + 8);  // K, then V: [stage][page]
  static constexpr int kPlaces = kMasks + 2 * kStages * kStepPages * 4;
  static constexpr int kUnits = kPlaces + 2 * static_cast<int>(sizeof(TilePlace));
  static constexpr int kBytes = kUnits + 8;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

inline constexpr int kNoPage = 0x7fffffff;  // outside the tensor maps
// Numbers of named barriers; 0 is that of __syncthreads.
inline constexpr int kClearBarrier = 1;
inline constexpr int kTurnBarrier = 2;  // to 4

struct Barriers {
  std::uint32_t base;
  __device__ std::uint32_t k_full(int stage) const { return base + 8 * stage; }
  __device__ std::uint32_t k_empty(int stage) const { return base + 8 * (kStages + stage); }
  __device__ std::uint32_t v_full(int stage) const { return base + 8 * (2 * kStages + stage); }
  __device__ std::uint32_t v_empty(int stage) const { return base + 8 * (3 * kStages + stage); }
  __device__ std::uint32_t q_full(int buffer) const { return base + 8 * (4 * kStages + buffer); }
  __device__ std::uint32_t q_empty(int buffer) const {
    return base + 8 * (4 * kStages + 2 + buffer);
  }
  __device__ std::uint32_t unit_full(int slot) const { return base + 8 * (4 * kStages + 4 + slot); }
  __device__ std::uint32_t unit_empty(int slot) const {
    return base + 8 * (4 * kStages + 6 + slot);
  }
};

// The units of work of this thread block: the first is its own, others come from the queue that all
// share, so that units of unknown lengths are spread evenly. The warp that loads K and V takes them
// and hands them on; -1 is the end.
struct UnitSource {
  const PrefillParams& p;
  volatile int* slots;  // [2] in shared memory
  const Barriers& barriers;
  int count = 0;

  __device__ void hand_on(int unit) {
    const int slot = count % 2;
    barrier_wait(barriers.unit_empty(slot), (count / 2 & 1) ^ 1);
    if (threadIdx.x % 32 == 0) {
      slots[slot] = unit;
      barrier_arrive(barriers.unit_full(slot));
    }
    ++count;
  }
  __device__ int first() {
    hand_on(blockIdx.x);
    return blockIdx.x;
  }
  __device__ int next() {
    int unit = INT_MAX;
    if (p.queue != nullptr && threadIdx.x % 32 == 0) {
      unit = static_cast<int>(gridDim.x) + atomicAdd(p.queue, 1);
    }
    unit = __shfl_sync(0xffffffffU, unit, 0);
    if (unit >= p.n_tiles * p.n_kv_heads * p.n_splits) unit = -1;
    hand_on(unit);
    return unit;
  }
  __device__ int follow() {
    const int slot = count % 2;
    barrier_sleep(barriers.unit_full(slot), count / 2 & 1);
    const int unit = slots[slot];
    barrier_arrive(barriers.unit_empty(slot));
    ++count;
    return unit;
  }
};

// Answers whether the unit has work.
__device__ inline bool find_unit(const PrefillParams& p, int unit, TilePlace& place,
                                 PrefillSlots& slots) {
  const int split = unit % p.n_splits;
  const PrefillItem item = prefill_item(p, unit / p.n_splits);
  const DeviceSequence sequence = p.sequences[item.sequence];
  place.row0 = item.tile * p.tile_rows;
  place.n_rows = sequence.n_queries * p.group;
  if (place.row0 >= place.n_rows) return false;
  slots = prefill_slots(p, sequence, item.sequence, item.head);
  place.query_0_slot = query_slot(sequence, slots, 0);
  const int last_row = min(place.row0 + p.tile_rows, place.n_rows) - 1;
  const int n_slots = place.query_0_slot + last_row / p.group + 1;
  const SplitRange range = split_range((n_slots + kWgmmaStepSlots - 1) / kWgmmaStepSlots,
                                       kWgmmaStepSlots, split, p.n_splits);
  place.begin = range.begin;
  place.n_steps = range.end - range.begin;
  place.n_used = range.n_used;
  place.head = item.head;
  place.query_begin = sequence.query_begin;
  place.partial_row = (item.item * p.n_splits + split) * p.tile_rows;
  return place.n_steps > 0;
}

// What the first lanes of a warp have for the pages of a step.
__device__ inline uint4 of_step_pages(std::uint32_t word) {
  static_assert(kStepPages == 4);
  return {__shfl_sync(~0U, word, 0), __shfl_sync(~0U, word, 1), __shfl_sync(~0U, word, 2),
          __shfl_sync(~0U, word, 3)};
}

// One warp loads K and V of all steps of all units. Masks are written by the lane that arrives at
// the barrier behind which they are read.
template <int kDim>
__device__ void load_pages(const WgmmaParams& params, std::byte* smem, std::uint32_t smem_address,
                           const Barriers& barriers) {
  using S = Smem<kDim>;
  constexpr int kBlocks = kDim / 32;
  const int lane = threadIdx.x % 32;
  auto* masks = reinterpret_cast<uint4*>(smem + S::kMasks);
  UnitSource units{params.p, reinterpret_cast<int*>(smem + S::kUnits), barriers};
  int count = 0;
  for (int unit = units.first(), next = -1; unit >= 0; unit = next) {
    TilePlace place;
    PrefillSlots slots;
    if (!find_unit(params.p, unit, place, slots)) {
      next = units.next();
      continue;
    }
    for (int i = 0; i < place.n_steps; ++i, ++count) {
      const int stage = count % kStages;
      const std::uint32_t reused = (count / kStages & 1) ^ 1;
      int number = kNoPage;
      bool expanded = false;
      std::uint32_t visible = 0;
      const int page = (place.begin + i) * kStepPages + lane;
      if (lane < kStepPages && page < slots.n_pages) {
        number = static_cast<int>(slots.number(page));
        expanded = page < slots.n_blocks;
        visible = slots.visible(page);
      }

      barrier_wait(barriers.k_empty(stage), reused);
      const uint4 k_mask = of_step_pages(visible);
      if (lane == 0) {
        masks[stage] = k_mask;
        barrier_expect(barriers.k_full(stage), S::kStageBytes);
      }
      __syncwarp();
      const int k_page = lane / kBlocks % kStepPages;
      const int block = lane % kBlocks;
      const int k_number = __shfl_sync(~0U, number, k_page);
      const bool k_expanded = __shfl_sync(~0U, static_cast<int>(expanded), k_page) != 0;
      if (lane < kStepPages * kBlocks) {
        load_box(smem_address + S::kK + stage * S::kStageBytes +
                     (block * kStepPages + k_page) * kPageSlots * kRowBytes,
                 k_expanded ? &params.k_expanded : &params.k_pool, block * 32, k_number,
                 barriers.k_full(stage));
      }

      barrier_wait(barriers.v_empty(stage), reused);
      // Hidden values of blocks are zeros already.
      const uint4 v_mask = of_step_pages(expanded ? 0xffffffffU : visible);
      if (lane == 0) {
        masks[kStages + stage] = v_mask;
        barrier_expect(barriers.v_full(stage), S::kStageBytes);
      }
      __syncwarp();
      if (lane < kStepPages) {
        load_box(smem_address + S::kV + stage * S::kStageBytes + lane * S::kPageBytes,
                 expanded ? &params.v_expanded : &params.v_pool, kDim, number,
                 barriers.v_full(stage));
      }
      // Early, so that the other warps load the next queries meanwhile.
      if (i == 0) next = units.next();
    }
  }
}

// The other warps of the warpgroup load Q and say what is to be done with it. Rows past the last
// query are zeros.
template <typename T, int kDim>
__device__ void load_queries(const PrefillParams& p, std::byte* smem, std::uint32_t smem_address,
                             const Barriers& barriers) {
  using S = Smem<kDim>;
  constexpr int kChunks = kDim / 8;
  const int thread = threadIdx.x - 32;
  auto* places = reinterpret_cast<TilePlace*>(smem + S::kPlaces);
  UnitSource units{p, reinterpret_cast<int*>(smem + S::kUnits), barriers};
  int count = 0;
  for (bool more = true; more;) {
    const int unit = units.follow();
    more = unit >= 0;
    TilePlace place;
    PrefillSlots slots;
    place.n_steps = 0;
    if (more && !find_unit(p, unit, place, slots)) continue;
    const int buffer = count % S::kQBuffers;
    barrier_sleep(barriers.q_empty(buffer), (count / S::kQBuffers & 1) ^ 1);
    if (thread == 0) places[count % 2] = place;
    const __half* q = p.q + std::int64_t{place.head} * p.group * kDim;
#pragma unroll 2
    for (int i = thread; more && i < wgmma_rows(kDim) * kChunks; i += kQueryThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const int r = place.row0 + row;
      const std::uint32_t target = smem_address + S::kQ + buffer * S::kQBytes +
                                   row / kGroupRows * S::kQGroupBytes +
                                   (chunk / 4 * kGroupRows + row % kGroupRows) * kRowBytes +
                                   ((chunk % 4 ^ (row >> 1 & 3)) << 4);
      if (r >= place.n_rows) {
        store_shared(target, make_uint4(0, 0, 0, 0));
        continue;
      }
      const std::int64_t token = place.query_begin + r / p.group;
      const __half* source = q + token * p.q_stride + (r % p.group) * kDim + chunk * 8;
      if constexpr (std::is_same_v<T, __half>) {
        copy_async(target, source);
      } else {
        store_shared(target, as_page_type<T>(*reinterpret_cast<const uint4*>(source)));
      }
    }
    commit_async();
    wait_async();
    fence_async_proxy();
    barrier_arrive(barriers.q_full(buffer));
    ++count;
  }
}

#endif

}  // namespace spindle::kernels::prefill
