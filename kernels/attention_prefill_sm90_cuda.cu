// Prefill attention for compute capability 9.0, with wgmma and the tensor copy engine.
//
// A thread block has three warpgroups: one loads, two compute 64 rows each. The loading warp copies
// K and V of 128 slots (4 pages) a step through tensor maps of the pool and of the expanded pages
// into two stages of shared memory, in the layout that wgmma reads: rows of 64 bytes with the
// 64-byte swizzle. The product of a step's weights with V runs while the softmax of the next step
// is computed, and the two warpgroups take turns in starting products, so that one computes weights
// while the other keeps the tensor cores busy.

#include <cuda.h>

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/prefill_mma.cuh"
#include "kernels/cuda/prefill_wgmma.cuh"
#include "kernels/cuda/prefill_work.cuh"

namespace spindle::kernels::prefill {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kQueryThreads = kGroupThreads - 32;
constexpr int kGroupRows = 64;
constexpr int kStepPages = kWgmmaStepSlots / kPageSlots;
constexpr int kRowBytes = 64;

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

template <int kDim, int kStages, bool kQRegisters>
struct Smem {
  static constexpr int kPageBytes = kDim * kRowBytes;  // of one side
  static constexpr int kStageBytes = kStepPages * kPageBytes;
  // Queries in registers leave their buffer at once.
  static constexpr int kQBuffers = kQRegisters ? 1 : 2;
  static constexpr int kQ = 0;  // [buffer][warpgroup][kDim / 32][64 rows][64 bytes]
  static constexpr int kQGroupBytes = kGroupRows * kDim * 2;
  static constexpr int kQBytes = 2 * kQGroupBytes;
  static constexpr int kK = kQ + kQBuffers * kQBytes;    // [stage][kDim / 32][128 slots][64 bytes]
  static constexpr int kV = kK + kStages * kStageBytes;  // [stage][page][kDim][64 bytes]
  static constexpr int kBarriers = kV + kStages * kStageBytes;
  static constexpr int kMasks = kBarriers + 8 * (4 * kStages + 4);  // K, then V: [stage][page]
  static constexpr int kPlaces = kMasks + 2 * kStages * kStepPages * 4;
  static constexpr int kBytes = kPlaces + 2 * static_cast<int>(sizeof(TilePlace));
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kNoPage = 0x7fffffff;  // outside the tensor maps
// Numbers of named barriers; 0 is that of __syncthreads.
constexpr int kGroupBarrier = 1;  // and 2
constexpr int kTurnBarrier = 3;   // and 4

template <int kStages>
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
};

// Units of work of this thread block: they are ordered from long to short, and every second round
// goes the other way, so that all thread blocks get about the same.
struct Units {
  const PrefillParams& p;
  int round = 0;

  __device__ int next() {
    const int n_units = p.n_tiles * p.n_kv_heads * p.n_splits;
    const int blocks = gridDim.x;
    for (; round * blocks < n_units; ++round) {
      const int unit = round * blocks + (round % 2 == 0 ? blockIdx.x : blocks - 1 - blockIdx.x);
      if (unit >= n_units) continue;
      ++round;
      return unit;
    }
    return -1;
  }
};

// Answers whether the unit has work.
__device__ inline bool find_unit(const PrefillParams& p, int unit, TilePlace& place,
                                 PrefillSlots& slots) {
  const int split = unit % p.n_splits;
  const PrefillItem item = prefill_item(p, unit / p.n_splits);
  const DeviceSequence sequence = p.sequences[item.sequence];
  place.row0 = item.tile * kPrefillRows;
  place.n_rows = sequence.n_queries * p.group;
  if (place.row0 >= place.n_rows) return false;
  slots = prefill_slots(p, sequence, item.sequence, item.head);
  place.query_0_slot = query_slot(sequence, slots, 0);
  const int last_row = min(place.row0 + kPrefillRows, place.n_rows) - 1;
  const int n_slots = place.query_0_slot + last_row / p.group + 1;
  const SplitRange range = split_range((n_slots + kWgmmaStepSlots - 1) / kWgmmaStepSlots,
                                       kWgmmaStepSlots, split, p.n_splits);
  place.begin = range.begin;
  place.n_steps = range.end - range.begin;
  place.n_used = range.n_used;
  place.head = item.head;
  place.query_begin = sequence.query_begin;
  place.partial_row = (item.item * p.n_splits + split) * kPrefillRows;
  return place.n_steps > 0;
}

// One warp loads K and V of all steps of all units.
template <int kDim, int kStages, bool kQRegisters>
__device__ void load_pages(const WgmmaParams& params, std::byte* smem, std::uint32_t smem_address,
                           const Barriers<kStages>& barriers) {
  using S = Smem<kDim, kStages, kQRegisters>;
  constexpr int kBlocks = kDim / 32;
  const int lane = threadIdx.x % 32;
  auto* masks = reinterpret_cast<std::uint32_t*>(smem + S::kMasks);
  Units units{params.p};
  int count = 0;
  for (int unit = units.next(); unit >= 0; unit = units.next()) {
    TilePlace place;
    PrefillSlots slots;
    if (!find_unit(params.p, unit, place, slots)) continue;
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
      if (lane < kStepPages) masks[stage * kStepPages + lane] = visible;
      __syncwarp();
      if (lane == 0) barrier_expect(barriers.k_full(stage), S::kStageBytes);
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
      if (lane < kStepPages) {
        masks[(kStages + stage) * kStepPages + lane] = expanded ? 0xffffffffU : visible;
      }
      __syncwarp();
      if (lane == 0) barrier_expect(barriers.v_full(stage), S::kStageBytes);
      __syncwarp();
      if (lane < kStepPages) {
        load_box(smem_address + S::kV + stage * S::kStageBytes + lane * S::kPageBytes,
                 expanded ? &params.v_expanded : &params.v_pool, kDim, number,
                 barriers.v_full(stage));
      }
    }
  }
}

// The other warps of the warpgroup load Q and say what is to be done with it. Rows past the last
// query are zeros.
template <typename T, int kDim, int kStages, bool kQRegisters>
__device__ void load_queries(const PrefillParams& p, std::byte* smem, std::uint32_t smem_address,
                             const Barriers<kStages>& barriers) {
  using S = Smem<kDim, kStages, kQRegisters>;
  constexpr int kChunks = kDim / 8;
  const int thread = threadIdx.x - 32;
  auto* places = reinterpret_cast<TilePlace*>(smem + S::kPlaces);
  Units units{p};
  int count = 0;
  for (bool more = true; more;) {
    const int unit = units.next();
    more = unit >= 0;
    TilePlace place;
    PrefillSlots slots;
    place.n_steps = 0;
    if (more && !find_unit(p, unit, place, slots)) continue;
    const int buffer = count % S::kQBuffers;
    barrier_wait(barriers.q_empty(buffer), (count / S::kQBuffers & 1) ^ 1);
    if (thread == 0) places[count % 2] = place;
    const __half* q = p.q + std::int64_t{place.head} * p.group * kDim;
#pragma unroll 2
    for (int i = thread; more && i < kPrefillRows * kChunks; i += kQueryThreads) {
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

// The rows of Q as the first operand: fragments in registers, or shared memory.
template <typename T, int kDim, bool kRegisters>
struct Queries {
  std::uint32_t q_smem;
  std::uint32_t fragments[kRegisters ? kDim / 16 : 1][4];

  __device__ explicit Queries(std::uint32_t address) : q_smem(address) {
    if constexpr (kRegisters) {
      const int lane = threadIdx.x % 32;
      const int row = threadIdx.x % kGroupThreads / 32 * 16 + lane % 16;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        const int chunk = k % 2 * 2 + lane / 16;
        load_matrices(fragments[k], q_smem + k / 2 * (kGroupRows * kRowBytes) + row * kRowBytes +
                                        ((chunk ^ (row >> 1 & 3)) << 4));
      }
    }
  }
  __device__ void start_scores(float (&s)[64], std::uint32_t k_smem) const {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const std::uint64_t keys =
          operand(k_smem + k / 2 * (kWgmmaStepSlots * kRowBytes) + k % 2 * 32);
      if constexpr (kRegisters) {
        wgmma<T>(s, fragments[k], keys, k != 0);
      } else {
        wgmma<T>(s, operand(q_smem + k / 2 * (kGroupRows * kRowBytes) + k % 2 * 32), keys, k != 0);
      }
    }
    wgmma_commit();
  }
};

template <typename T, int kDim>
__device__ void start_values(float (&o)[kDim / 2], const std::uint32_t (&weights)[8][4],
                             std::uint32_t v_smem) {
#pragma unroll
  for (int k = 0; k < kWgmmaStepSlots / 16; ++k) {
    wgmma<T>(o, weights[k], operand(v_smem + k / 2 * kDim * kRowBytes + k % 2 * 32), 1);
  }
  wgmma_commit();
}

// A tile's two rows of a lane: g and g + 8 of its warp's 16.
struct RowState {
  float best[2] = {-INFINITY, -INFINITY};
  float mass[2] = {};
};

// Scores become weights relative to the new maximum; answers what earlier sums are multiplied by.
__device__ inline void soften(float (&s)[64], RowState& state, float scale_log2,
                              float (&decay)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float best = state.best[i];
#pragma unroll
    for (int n = 0; n < 16; ++n) best = fmaxf(best, fmaxf(s[4 * n + 2 * i], s[4 * n + 2 * i + 1]));
    best = quad_max(best);
    const float shift = best == -INFINITY ? 0.0F : best * scale_log2;
    decay[i] = exp2_approx(fmaf(state.best[i], scale_log2, -shift));
    state.best[i] = best;
    float mass = 0;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * n + 2 * i + e];
        x = exp2_approx(fmaf(x, scale_log2, -shift));
        mass += x;
      }
    }
    state.mass[i] = state.mass[i] * decay[i] + mass;
  }
}

template <typename T>
__device__ inline void pack_weights(const float (&s)[64], std::uint32_t (&weights)[8][4]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[k][i] = pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  }
}

template <typename T, int kDim, int kStages, bool kTurns, bool kQRegisters>
struct Consumer {
  using S = Smem<kDim, kStages, kQRegisters>;
  const PrefillParams& p;
  const std::byte* smem;
  std::uint32_t smem_address;
  Barriers<kStages> barriers;
  int group;  // 0 or 1

  __device__ uint4 mask_words(int index) const {
    return *reinterpret_cast<const uint4*>(smem + S::kMasks + index * 16);
  }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  // Row of the lane in the warpgroup, and the one 8 below.
  __device__ static int lane_row() {
    return static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16 + lane() / 4;
  }
  // Of a warp that has read what the barrier guards.
  __device__ static void leave(std::uint32_t barrier) {
    __syncwarp();
    if (lane() == 0) barrier_arrive(barrier);
  }

  __device__ void mask(float (&s)[64], const TilePlace& place, int step, int stage) const {
    const uint4 visible = mask_words(stage);
    const int slot0 = (place.begin + step) * kWgmmaStepSlots;
    const int row0 = place.row0 + group * kGroupRows;
    const int n_seen = place.query_0_slot + min(row0, place.n_rows - 1) / p.group + 1;  // by all
    const bool all = (visible.x & visible.y & visible.z & visible.w) == 0xffffffffU;
    if (all && slot0 + kWgmmaStepSlots <= n_seen) return;
    const std::uint32_t words[4] = {visible.x, visible.y, visible.z, visible.w};
    int last[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(row0 + lane_row() + i * 8, place.n_rows - 1);
      last[i] = place.query_0_slot + row / p.group - slot0;
    }
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + lane() % 4 * 2 + e;
        const bool seen = words[n / 4] >> (column % 32) & 1U;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!seen || column > last[i]) s[4 * n + 2 * i + e] = -INFINITY;
        }
      }
    }
  }

  // Memory of slots that nobody sees may hold anything, also NaN, and 0 * NaN would reach the sum.
  // Both warpgroups clear all of it, so neither waits for the other.
  __device__ void clear_hidden_values(int stage) const {
    const uint4 visible = mask_words(kStages + stage);
    if ((visible.x & visible.y & visible.z & visible.w) == 0xffffffffU) return;
    const std::uint32_t words[4] = {visible.x, visible.y, visible.z, visible.w};
    const int row = static_cast<int>(threadIdx.x) % kGroupThreads;
    if (row < kDim) {
#pragma unroll
      for (int page = 0; page < kStepPages; ++page) {
        if (words[page] == 0xffffffffU) continue;
        clear_hidden_row(
            smem_address + S::kV + stage * S::kStageBytes + page * S::kPageBytes + row * kRowBytes,
            row, words[page]);
      }
    }
    fence_async_proxy();
    named_sync(kGroupBarrier + group, kGroupThreads);
  }

  __device__ void write(const float (&o)[kDim / 2], const RowState& state,
                        const TilePlace& place) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile_row = group * kGroupRows + lane_row() + i * 8;
      const int r = place.row0 + tile_row;
      const bool there = r < place.n_rows;
      const float mass = quad_sum(state.mass[i]);
      if (place.n_used > 1) {
        if (!there) continue;
        const std::int64_t row = place.partial_row + tile_row;
        if (lane() % 4 == 0) p.partial_mass[row] = make_float2(state.best[i], mass);
        float* target = p.partial_out + row * kDim + lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          *reinterpret_cast<float2*>(target + n * 8) =
              make_float2(o[4 * n + 2 * i], o[4 * n + 2 * i + 1]);
        }
        continue;
      }
      const float inverse = 1.0F / mass;
      const std::int64_t token = place.query_begin + r / p.group;
      __nv_bfloat16* target = p.out + token * p.out_stride +
                              (std::int64_t{place.head} * p.group + r % p.group) * kDim +
                              lane() % 4 * 8;
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 4) {
        std::uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          words[k] = pack<__nv_bfloat16>(o[4 * (n + k) + 2 * i] * inverse,
                                         o[4 * (n + k) + 2 * i + 1] * inverse);
        }
        quad_transpose(words);
        if (there) {
          *reinterpret_cast<uint4*>(target + n * 8) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  // One unit, whose first step is number `first` of the thread block. The product of a step's
  // weights with V is started behind the scores of the next step, whose softmax it runs under.
  __device__ void compute(const TilePlace& place, int buffer, int first) const {
    const std::uint32_t q_smem =
        smem_address + S::kQ + buffer * S::kQBytes + group * S::kQGroupBytes;
    const Queries<T, kDim, kQRegisters> queries(q_smem);
    if (kQRegisters) leave(barriers.q_empty(buffer));

    float s[64];
    float o[kDim / 2];
    std::uint32_t weights[8][4];
    RowState state;
    float decay[2];
#pragma unroll
    for (float& x : o) x = 0;

    const int n_steps = place.n_steps;
    int stage = first % kStages;
    std::uint32_t phase = first / kStages & 1;
    barrier_wait(barriers.k_full(stage), phase);
    wgmma_fence();
    queries.start_scores(s, smem_address + S::kK + stage * S::kStageBytes);
    wgmma_wait<0>();
    pin(s);
    mask(s, place, 0, stage);
    leave(barriers.k_empty(stage));
    soften(s, state, p.scale_log2, decay);
    pack_weights<T>(s, weights);
    if (kTurns && group == 1 && n_steps > 1) named_arrive(kTurnBarrier, 2 * kGroupThreads);

    for (int i = 1; i < n_steps; ++i) {
      const int v_stage = stage;
      const std::uint32_t v_phase = phase;
      stage = (first + i) % kStages;
      phase = (first + i) / kStages & 1;
      barrier_wait(barriers.k_full(stage), phase);
      barrier_wait(barriers.v_full(v_stage), v_phase);
      clear_hidden_values(v_stage);
      if (kTurns) named_sync(kTurnBarrier + group, 2 * kGroupThreads);
      pin(o);
      wgmma_fence();
      queries.start_scores(s, smem_address + S::kK + stage * S::kStageBytes);
      start_values<T, kDim>(o, weights, smem_address + S::kV + v_stage * S::kStageBytes);
      if (kTurns && (group == 0 || i + 1 < n_steps)) {
        named_arrive(kTurnBarrier + 1 - group, 2 * kGroupThreads);
      }
      wgmma_wait<1>();
      pin(s);
      mask(s, place, i, stage);
      leave(barriers.k_empty(stage));
      soften(s, state, p.scale_log2, decay);
      wgmma_wait<0>();
      pin(o);
      leave(barriers.v_empty(v_stage));
      // Most steps have no new maximum.
      if (__any_sync(0xffffffffU, decay[0] != 1.0F || decay[1] != 1.0F)) {
#pragma unroll
        for (int n = 0; n < kDim / 2; ++n) o[n] *= decay[n / 2 % 2];
      }
      pack_weights<T>(s, weights);
    }

    barrier_wait(barriers.v_full(stage), phase);
    clear_hidden_values(stage);
    pin(o);
    wgmma_fence();
    start_values<T, kDim>(o, weights, smem_address + S::kV + stage * S::kStageBytes);
    wgmma_wait<0>();
    pin(o);
    leave(barriers.v_empty(stage));
    write(o, state, place);
    // Not earlier: with the queries, `place` is overwritten.
    if (!kQRegisters) leave(barriers.q_empty(buffer));
  }
};

template <typename T, int kDim, int kStages, bool kTurns, bool kQRegisters>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_wgmma_kernel(const __grid_constant__ WgmmaParams params) {
  using S = Smem<kDim, kStages, kQRegisters>;
  extern __shared__ __align__(1024) std::byte smem[];
  const std::uint32_t smem_address = shared_address(smem);
  const Barriers<kStages> barriers{smem_address + S::kBarriers};

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 2 * kGroupThreads / 32;
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(barriers.k_full(stage), 1);
      barrier_init(barriers.v_full(stage), 1);
      barrier_init(barriers.k_empty(stage), kConsumerWarps);
      barrier_init(barriers.v_empty(stage), kConsumerWarps);
    }
    for (int buffer = 0; buffer < S::kQBuffers; ++buffer) {
      barrier_init(barriers.q_full(buffer), kQueryThreads);
      barrier_init(barriers.q_empty(buffer), kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x < kGroupThreads) {
    registers_down<40>();
    if (threadIdx.x < 32) {
      load_pages<kDim, kStages, kQRegisters>(params, smem, smem_address, barriers);
    } else {
      load_queries<T, kDim, kStages, kQRegisters>(params.p, smem, smem_address, barriers);
    }
  } else {
    registers_up<232>();
    const Consumer<T, kDim, kStages, kTurns, kQRegisters> consumer{
        params.p, smem, smem_address, barriers, static_cast<int>(threadIdx.x) / kGroupThreads - 1};
    const auto* places = reinterpret_cast<const TilePlace*>(smem + S::kPlaces);
    int first = 0;
    for (int unit = 0;; ++unit) {
      const int buffer = unit % S::kQBuffers;
      barrier_wait(barriers.q_full(buffer), unit / S::kQBuffers & 1);
      const TilePlace& place = places[unit % 2];
      const int n_steps = place.n_steps;
      if (n_steps == 0) break;
      consumer.compute(place, buffer, first);
      first += n_steps;
    }
  }
}

#else

// Of other targets in the same binary; launch_prefill_wgmma is only for 9.0.
template <typename T, int kDim, int kStages, bool kTurns, bool kQRegisters>
__global__ void prefill_wgmma_kernel(const __grid_constant__ WgmmaParams) {
  __trap();
}

#endif

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &found),
             "cuTensorMapEncodeTiled");
  CHECK(found == cudaDriverEntryPointSuccess && function != nullptr,
        "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<EncodeTiled>(function);
}

void encode_pages(EncodeTiled encode, const std::byte* pages, int head_dim, DType dtype,
                  int box_rows, CUtensorMap& map) {
  const auto rows = static_cast<cuuint64_t>(2 * head_dim);
  const cuuint64_t page_bytes = rows * kRowBytes;
  // As far as places in a pool reach; the end of the memory behind `pages` is not known here.
  const cuuint64_t n_pages = (cuuint64_t{1} << 32) * kKvPlaceBytes / page_bytes;
  const cuuint64_t sizes[3] = {32, rows, n_pages};
  const cuuint64_t strides[2] = {kRowBytes, page_bytes};
  const cuuint32_t box[3] = {32, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = encode(
      &map,
      dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<std::byte*>(pages), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(result == CUDA_SUCCESS, "tensor map of KV pages");
}

template <typename T, int kDim, int kStages, bool kTurns, bool kQRegisters>
void launch_variant(const WgmmaParams& params, int n_blocks, cudaStream_t stream) {
  constexpr auto kKernel = prefill_wgmma_kernel<T, kDim, kStages, kTurns, kQRegisters>;
  constexpr int kBytes = Smem<kDim, kStages, kQRegisters>::kBytes;
  cuda_check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "shared memory of attention_prefill");
  kKernel<<<static_cast<unsigned>(n_blocks), kThreads, kBytes, stream>>>(params);
  check_launch("attention_prefill (wgmma)");
}

template <typename T, int kDim>
void launch(const WgmmaParams& params, int n_blocks, cudaStream_t stream) {
  if constexpr (kDim == 128 && std::is_same_v<T, __half>) {
    switch (params.p.variant) {
      case 1:
        return launch_variant<T, kDim, 3, true, true>(params, n_blocks, stream);
      case 2:
        return launch_variant<T, kDim, 2, true, true>(params, n_blocks, stream);
      case 3:
        return launch_variant<T, kDim, 2, false, false>(params, n_blocks, stream);
      default:
        break;
    }
  }
  launch_variant<T, kDim, 2, true, false>(params, n_blocks, stream);
}

}  // namespace

void launch_prefill_wgmma(const PrefillParams& params, int head_dim, DType dtype, int n_blocks,
                          cudaStream_t stream) {
  static const EncodeTiled encode = encode_tiled();
  WgmmaParams all;
  all.p = params;
  encode_pages(encode, params.pool, head_dim, dtype, 32, all.k_pool);
  encode_pages(encode, params.pool, head_dim, dtype, head_dim, all.v_pool);
  if (params.expanded != nullptr) {
    encode_pages(encode, params.expanded, head_dim, dtype, 32, all.k_expanded);
    encode_pages(encode, params.expanded, head_dim, dtype, head_dim, all.v_expanded);
  }
  if (dtype == DType::kF16) {
    head_dim == 128 ? launch<__half, 128>(all, n_blocks, stream)
                    : launch<__half, 64>(all, n_blocks, stream);
  } else {
    head_dim == 128 ? launch<__nv_bfloat16, 128>(all, n_blocks, stream)
                    : launch<__nv_bfloat16, 64>(all, n_blocks, stream);
  }
}

}  // namespace spindle::kernels::prefill
