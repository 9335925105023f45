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
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/prefill_mma.cuh"
#include "kernels/cuda/prefill_wgmma.cuh"
#include "kernels/cuda/prefill_work.cuh"

namespace spindle::kernels::prefill {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kThreads = 3 * kGroupThreads;
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

template <int kDim, int kStages>
struct Smem {
  static constexpr int kPageBytes = kDim * kRowBytes;  // of one side
  static constexpr int kStageBytes = kStepPages * kPageBytes;
  static constexpr int kQ = 0;  // [warpgroup][kDim / 32][64 rows][64 bytes]
  static constexpr int kQGroupBytes = kGroupRows * kDim * 2;
  static constexpr int kK = kQ + 2 * kQGroupBytes;       // [stage][kDim / 32][128 slots][64 bytes]
  static constexpr int kV = kK + kStages * kStageBytes;  // [stage][page][kDim][64 bytes]
  static constexpr int kBarriers = kV + kStages * kStageBytes;
  static constexpr int kMasks = kBarriers + 8 * 4 * kStages;  // of K, then of V: [stage][page]
  static constexpr int kBytes = kMasks + 2 * kStages * kStepPages * 4;
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
};

// One warp.
template <int kDim, int kStages>
__device__ void load_steps(const WgmmaParams& params, const PrefillSlots& slots,
                           const SplitRange& range, std::byte* smem, std::uint32_t smem_address,
                           const Barriers<kStages>& barriers) {
  using S = Smem<kDim, kStages>;
  constexpr int kBlocks = kDim / 32;
  const int lane = threadIdx.x % 32;
  auto* masks = reinterpret_cast<std::uint32_t*>(smem + S::kMasks);
  for (int i = 0; i < range.end - range.begin; ++i) {
    const int stage = i % kStages;
    const std::uint32_t reused = (i / kStages & 1) ^ 1;
    int number = kNoPage;
    bool expanded = false;
    std::uint32_t visible = 0;
    const int page = (range.begin + i) * kStepPages + lane;
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

// Rows of one warpgroup; those past the last query are zeros.
template <typename T, int kDim>
__device__ void load_q(const PrefillParams& p, const DeviceSequence& sequence, int head, int row0,
                       int n_rows, std::uint32_t q_smem) {
  constexpr int kChunks = kDim / 8;
  const __half* q = p.q + std::int64_t{head} * p.group * kDim;
#pragma unroll 4
  for (int i = threadIdx.x % kGroupThreads; i < kGroupRows * kChunks; i += kGroupThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int r = row0 + row;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (r < n_rows) {
      const std::int64_t token = sequence.query_begin + r / p.group;
      value = *reinterpret_cast<const uint4*>(q + token * p.q_stride + (r % p.group) * kDim +
                                              chunk * 8);
    }
    store_shared(q_smem + chunk / 4 * (kGroupRows * kRowBytes) + row * kRowBytes +
                     ((chunk % 4 ^ (row >> 1 & 3)) << 4),
                 as_page_type<T>(value));
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

template <int kDim, int kStages>
struct Consumer {
  using S = Smem<kDim, kStages>;
  const PrefillParams& p;
  const std::byte* smem;
  std::uint32_t smem_address;
  int group;         // 0 or 1
  int row0;          // of the warpgroup
  int n_rows;        // of the sequence
  int query_0_slot;  // slot of the sequence's first query
  int n_slots;       // that all of the warpgroup's rows see, if they are visible

  __device__ void mask(float (&s)[64], int step, int stage) const {
    const uint4 visible = *reinterpret_cast<const uint4*>(smem + S::kMasks + stage * 16);
    const int slot0 = step * kWgmmaStepSlots;
    const bool all = (visible.x & visible.y & visible.z & visible.w) == 0xffffffffU;
    if (all && slot0 + kWgmmaStepSlots <= n_slots) return;
    const std::uint32_t words[4] = {visible.x, visible.y, visible.z, visible.w};
    const int lane = threadIdx.x % 32;
    int last[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + threadIdx.x % kGroupThreads / 32 * 16 + i * 8 + lane / 4;
      last[i] = query_0_slot + min(row, n_rows - 1) / p.group - slot0;
    }
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + lane % 4 * 2 + e;
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
    const uint4 visible =
        *reinterpret_cast<const uint4*>(smem + S::kMasks + (kStages + stage) * 16);
    if ((visible.x & visible.y & visible.z & visible.w) == 0xffffffffU) return;
    const std::uint32_t words[4] = {visible.x, visible.y, visible.z, visible.w};
    const int row = threadIdx.x % kGroupThreads;
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
};

template <typename T, int kDim, int kStages, bool kTurns, bool kQRegisters>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_wgmma_kernel(const __grid_constant__ WgmmaParams params) {
  using S = Smem<kDim, kStages>;
  const PrefillParams& p = params.p;
  extern __shared__ __align__(1024) std::byte smem[];
  const std::uint32_t smem_address = shared_address(smem);
  const Barriers<kStages> barriers{smem_address + S::kBarriers};

  const int split = blockIdx.x % p.n_splits;
  const PrefillItem item = prefill_item(p, blockIdx.x / p.n_splits);
  const DeviceSequence sequence = p.sequences[item.sequence];
  const int tile_row0 = item.tile * kPrefillRows;
  const int n_rows = sequence.n_queries * p.group;
  if (tile_row0 >= n_rows) return;
  const PrefillSlots slots = prefill_slots(p, sequence, item.sequence, item.head);
  const int last_row = min(tile_row0 + kPrefillRows, n_rows) - 1;
  const int n_slots = query_slot(sequence, slots, last_row / p.group) + 1;
  const SplitRange range = split_range((n_slots + kWgmmaStepSlots - 1) / kWgmmaStepSlots,
                                       kWgmmaStepSlots, split, p.n_splits);
  if (range.begin >= range.end) return;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(barriers.k_full(stage), 1);
      barrier_init(barriers.v_full(stage), 1);
      barrier_init(barriers.k_empty(stage), 2 * kGroupThreads / 32);
      barrier_init(barriers.v_empty(stage), 2 * kGroupThreads / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async_proxy();
  }
  __syncthreads();

  if (threadIdx.x < kGroupThreads) {
    registers_down<40>();
    if (threadIdx.x < 32) {
      load_steps<kDim, kStages>(params, slots, range, smem, smem_address, barriers);
    }
  } else {
    registers_up<232>();
    const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
    const int row0 = tile_row0 + group * kGroupRows;
    const int lane = threadIdx.x % 32;
    const int query_0_slot = query_slot(sequence, slots, 0);
    const Consumer<kDim, kStages> consumer{
        p,    smem,   smem_address, group,
        row0, n_rows, query_0_slot, query_0_slot + min(row0, n_rows - 1) / p.group + 1};
    const std::uint32_t q_smem = smem_address + S::kQ + group * S::kQGroupBytes;
    load_q<T, kDim>(p, sequence, item.head, row0, n_rows, q_smem);
    fence_async_proxy();
    named_sync(kGroupBarrier + group, kGroupThreads);

    const Queries<T, kDim, kQRegisters> queries(q_smem);

    float s[64];
    float o[kDim / 2];
    std::uint32_t weights[8][4];
    RowState state;
    float decay[2];
#pragma unroll
    for (float& x : o) x = 0;

    const int n_steps = range.end - range.begin;
    barrier_wait(barriers.k_full(0), 0);
    wgmma_fence();
    queries.start_scores(s, smem_address + S::kK);
    wgmma_wait<0>();
    pin(s);
    consumer.mask(s, range.begin, 0);
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.k_empty(0));
    soften(s, state, p.scale_log2, decay);
    pack_weights<T>(s, weights);
    if (kTurns && group == 1 && n_steps > 1) named_arrive(kTurnBarrier, 2 * kGroupThreads);

    for (int i = 1; i < n_steps; ++i) {
      const int stage = i % kStages;
      const int v_stage = (i - 1) % kStages;
      barrier_wait(barriers.k_full(stage), i / kStages & 1);
      barrier_wait(barriers.v_full(v_stage), (i - 1) / kStages & 1);
      consumer.clear_hidden_values(v_stage);
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
      consumer.mask(s, range.begin + i, stage);
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.k_empty(stage));
      soften(s, state, p.scale_log2, decay);
      wgmma_wait<0>();
      pin(o);
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.v_empty(v_stage));
#pragma unroll
      for (int n = 0; n < kDim / 2; ++n) o[n] *= decay[n / 2 % 2];
      pack_weights<T>(s, weights);
    }

    const int v_stage = (n_steps - 1) % kStages;
    barrier_wait(barriers.v_full(v_stage), (n_steps - 1) / kStages & 1);
    consumer.clear_hidden_values(v_stage);
    pin(o);
    wgmma_fence();
    start_values<T, kDim>(o, weights, smem_address + S::kV + v_stage * S::kStageBytes);
    wgmma_wait<0>();
    pin(o);

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile_row =
          group * kGroupRows + threadIdx.x % kGroupThreads / 32 * 16 + i * 8 + lane / 4;
      const int r = tile_row0 + tile_row;
      const float mass = quad_sum(state.mass[i]);
      if (r >= n_rows) continue;
      if (range.n_used > 1) {
        const std::int64_t row =
            (std::int64_t{item.item} * p.n_splits + split) * kPrefillRows + tile_row;
        if (lane % 4 == 0) p.partial_mass[row] = make_float2(state.best[i], mass);
        float* target = p.partial_out + row * kDim + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          *reinterpret_cast<float2*>(target + n * 8) =
              make_float2(o[4 * n + 2 * i], o[4 * n + 2 * i + 1]);
        }
      } else {
        const float inverse = 1.0F / mass;
        const std::int64_t token = sequence.query_begin + r / p.group;
        __nv_bfloat16* target = p.out + token * p.out_stride +
                                (std::int64_t{item.head} * p.group + r % p.group) * kDim +
                                lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          *reinterpret_cast<__nv_bfloat162*>(target + n * 8) =
              __floats2bfloat162_rn(o[4 * n + 2 * i] * inverse, o[4 * n + 2 * i + 1] * inverse);
        }
      }
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
void launch_variant(const WgmmaParams& params, int n_items, cudaStream_t stream) {
  constexpr auto kKernel = prefill_wgmma_kernel<T, kDim, kStages, kTurns, kQRegisters>;
  constexpr int kBytes = Smem<kDim, kStages>::kBytes;
  cuda_check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "shared memory of attention_prefill");
  kKernel<<<static_cast<unsigned>(n_items * params.p.n_splits), kThreads, kBytes, stream>>>(params);
  check_launch("attention_prefill (wgmma)");
}

template <typename T, int kDim>
void launch(const WgmmaParams& params, int n_items, cudaStream_t stream) {
  if constexpr (kDim == 128 && std::is_same_v<T, __half>) {
    switch (params.p.variant) {
      case 1:
        return launch_variant<T, kDim, 2, false, false>(params, n_items, stream);
      case 2:
        return launch_variant<T, kDim, 3, true, false>(params, n_items, stream);
      case 3:
        return launch_variant<T, kDim, 2, true, true>(params, n_items, stream);
      case 4:
        return launch_variant<T, kDim, 2, false, true>(params, n_items, stream);
      default:
        break;
    }
  }
  launch_variant<T, kDim, 2, true, false>(params, n_items, stream);
}

}  // namespace

void launch_prefill_wgmma(const PrefillParams& params, int head_dim, DType dtype, int n_items,
                          cudaStream_t stream) {
  const EncodeTiled encode = encode_tiled();
  WgmmaParams all;
  all.p = params;
  const std::byte* expanded = params.expanded != nullptr ? params.expanded : params.pool;
  encode_pages(encode, params.pool, head_dim, dtype, 32, all.k_pool);
  encode_pages(encode, params.pool, head_dim, dtype, head_dim, all.v_pool);
  encode_pages(encode, expanded, head_dim, dtype, 32, all.k_expanded);
  encode_pages(encode, expanded, head_dim, dtype, head_dim, all.v_expanded);
  if (dtype == DType::kF16) {
    head_dim == 128 ? launch<__half, 128>(all, n_items, stream)
                    : launch<__half, 64>(all, n_items, stream);
  } else {
    head_dim == 128 ? launch<__nv_bfloat16, 128>(all, n_items, stream)
                    : launch<__nv_bfloat16, 64>(all, n_items, stream);
  }
}

}  // namespace spindle::kernels::prefill
