// Prefill attention for compute capability 9.0, with wgmma and the tensor copy engine.
//
// A thread block has one warpgroup that loads and two or three that compute 64 rows each; it takes
// one unit of work after the other and its warps load for the next while others still compute the
// last. One warp copies K and V of 128 slots (4 pages) a step through tensor maps of the pool and
// of the expanded pages into two stages of shared memory, in the layout that wgmma reads: rows of
// 64 bytes with the 64-byte swizzle. The product of a step's weights with V runs while the softmax
// of the next step is computed, and the computing warpgroups take turns in starting products, so
// that some compute weights while another keeps the tensor cores busy.

#include <cuda.h>

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/prefill_loaders.cuh"
#include "kernels/cuda/prefill_mma.cuh"
#include "kernels/cuda/prefill_wgmma.cuh"
#include "kernels/cuda/prefill_work.cuh"

namespace spindle::kernels::prefill {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The warpgroup's rows of Q as the first operand. As fragments in registers they leave the reads of
// shared memory to K and V.
template <typename T, int kDim>
struct Queries {
  static constexpr bool kRegisters = Smem<kDim>::kQRegisters;
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

template <typename T, int kDim>
struct Consumer {
  using S = Smem<kDim>;
  static constexpr int kGroups = wgmma_groups(kDim);
  const PrefillParams& p;
  const std::byte* smem;
  std::uint32_t smem_address;
  Barriers barriers;
  int group;

  __device__ uint4 mask_words(int index) const {
    return *reinterpret_cast<const uint4*>(smem + S::kMasks + index * 16);
  }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  // Row of the lane in the warpgroup, and the one 8 below.
  __device__ static int lane_row() {
    return static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16 + lane() / 4;
  }

  // Of a step that begins at slot0; all rows of the warpgroup see the slots up to n_seen.
  __device__ void mask(float (&s)[64], const TilePlace& place, int slot0, int n_seen,
                       int stage) const {
    const uint4 visible = mask_words(stage);
    const bool all = (visible.x & visible.y & visible.z & visible.w) == 0xffffffffU;
    if (all && slot0 + kWgmmaStepSlots <= n_seen) return;
    const std::uint32_t words[4] = {visible.x, visible.y, visible.z, visible.w};
    int last[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(place.row0 + group * kGroupRows + lane_row() + i * 8, place.n_rows - 1);
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
  // The warpgroups share the rows, and meet: steps with such slots are few.
  __device__ void clear_hidden_values(int stage) const {
    const uint4 visible = mask_words(kStages + stage);
    if ((visible.x & visible.y & visible.z & visible.w) == 0xffffffffU) return;
    const std::uint32_t words[4] = {visible.x, visible.y, visible.z, visible.w};
    const int thread = static_cast<int>(threadIdx.x) - kGroupThreads;
#pragma unroll
    for (int page = 0; page < kStepPages; ++page) {
      // Pages go round the warps, so that every warpgroup has its part of each.
      const int row = (thread + page * kDim) % (kGroups * kGroupThreads);
      if (row >= kDim || words[page] == 0xffffffffU) continue;
      clear_hidden_row(
          smem_address + S::kV + stage * S::kStageBytes + page * S::kPageBytes + row * kRowBytes,
          row, words[page]);
    }
    fence_async_proxy();
    named_sync(kClearBarrier, kGroups * kGroupThreads);
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
    const Queries<T, kDim> queries(q_smem);
    if (S::kQRegisters) barrier_arrive(barriers.q_empty(buffer));

    float s[64];
    float o[kDim / 2];
    std::uint32_t weights[8][4];
    RowState state;
    float decay[2];
#pragma unroll
    for (float& x : o) x = 0;

    const int n_steps = place.n_steps;
    int slot0 = place.begin * kWgmmaStepSlots;
    const int n_seen =
        place.query_0_slot + min(place.row0 + group * kGroupRows, place.n_rows - 1) / p.group + 1;
    int stage = first % kStages;
    std::uint32_t phase = first / kStages & 1;
    barrier_wait(barriers.k_full(stage), phase);
    wgmma_fence();
    queries.start_scores(s, smem_address + S::kK + stage * S::kStageBytes);
    wgmma_wait<0>();
    pin(s);
    mask(s, place, slot0, n_seen, stage);
    barrier_arrive(barriers.k_empty(stage));
    soften(s, state, p.scale_log2, decay);
    pack_weights<T>(s, weights);
    // The last group gives the first its first turn, and not one after its last.
    if (group == kGroups - 1 && n_steps > 1) named_arrive(kTurnBarrier, 2 * kGroupThreads);

    for (int i = 1; i < n_steps; ++i) {
      const int v_stage = stage;
      const std::uint32_t v_phase = phase;
      stage = (first + i) % kStages;
      phase = (first + i) / kStages & 1;
      barrier_wait(barriers.k_full(stage), phase);
      barrier_wait(barriers.v_full(v_stage), v_phase);
      clear_hidden_values(v_stage);
      named_sync(kTurnBarrier + group, 2 * kGroupThreads);
      pin(o);
      wgmma_fence();
      queries.start_scores(s, smem_address + S::kK + stage * S::kStageBytes);
      start_values<T, kDim>(o, weights, smem_address + S::kV + v_stage * S::kStageBytes);
      if (group < kGroups - 1 || i + 1 < n_steps) {
        named_arrive(kTurnBarrier + (group + 1) % kGroups, 2 * kGroupThreads);
      }
      wgmma_wait<1>();
      pin(s);
      slot0 += kWgmmaStepSlots;
      mask(s, place, slot0, n_seen, stage);
      barrier_arrive(barriers.k_empty(stage));
      soften(s, state, p.scale_log2, decay);
      wgmma_wait<0>();
      pin(o);
      barrier_arrive(barriers.v_empty(v_stage));
#pragma unroll
      for (int n = 0; n < kDim / 2; ++n) o[n] *= decay[n / 2 % 2];
      pack_weights<T>(s, weights);
    }

    barrier_wait(barriers.v_full(stage), phase);
    clear_hidden_values(stage);
    pin(o);
    wgmma_fence();
    start_values<T, kDim>(o, weights, smem_address + S::kV + stage * S::kStageBytes);
    wgmma_wait<0>();
    pin(o);
    barrier_arrive(barriers.v_empty(stage));
    write(o, state, place);
    // Not earlier: `place` is overwritten with the queries.
    if (!S::kQRegisters) barrier_arrive(barriers.q_empty(buffer));
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(wgmma_threads(kDim), 1)
    prefill_wgmma_kernel(const __grid_constant__ WgmmaParams params) {
  using S = Smem<kDim>;
  extern __shared__ __align__(1024) std::byte smem[];
  const std::uint32_t smem_address = shared_address(smem);
  const Barriers barriers{smem_address + S::kBarriers};

  // All threads that read what a barrier guards arrive at it, each for itself: no slower than one
  // for its warp behind a __syncwarp, which racecheck does not follow.
  if (threadIdx.x == 0) {
    constexpr int kConsumers = wgmma_groups(kDim) * kGroupThreads;
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(barriers.k_full(stage), 1);
      barrier_init(barriers.v_full(stage), 1);
      barrier_init(barriers.k_empty(stage), kConsumers);
      barrier_init(barriers.v_empty(stage), kConsumers);
    }
    for (int buffer = 0; buffer < S::kQBuffers; ++buffer) {
      barrier_init(barriers.q_full(buffer), kQueryThreads);
      barrier_init(barriers.q_empty(buffer), kConsumers);
    }
    for (int slot = 0; slot < 2; ++slot) {
      barrier_init(barriers.unit_full(slot), 1);
      barrier_init(barriers.unit_empty(slot), kQueryThreads);
    }
    fence_barrier_init();
  }
  wait_for_previous_kernel();
  __syncthreads();
  let_next_kernel_start();

  if (threadIdx.x < kGroupThreads) {
    registers_down<kDim == 64 ? 32 : 40>();
    if (threadIdx.x < 32) {
      load_pages<kDim>(params, smem, smem_address, barriers);
    } else {
      load_queries<T, kDim>(params.p, smem, smem_address, barriers);
    }
  } else {
    registers_up<kDim == 64 ? 160 : 232>();
    const Consumer<T, kDim> consumer{params.p, smem, smem_address, barriers,
                                     static_cast<int>(threadIdx.x) / kGroupThreads - 1};
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
template <typename T, int kDim>
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

template <typename T, int kDim>
void launch(const CudaContext& context, const WgmmaParams& params, int n_blocks) {
  constexpr auto kKernel = prefill_wgmma_kernel<T, kDim>;
  constexpr int kBytes = Smem<kDim>::kBytes;
  cuda_check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "shared memory of attention_prefill");
  launch_chained(context, "attention_prefill (wgmma)", kKernel, n_blocks, wgmma_threads(kDim),
                 kBytes, params);
}

}  // namespace

void launch_prefill_wgmma(const CudaContext& context, const PrefillParams& params, int head_dim,
                          DType dtype, int n_blocks) {
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
    head_dim == 128 ? launch<__half, 128>(context, all, n_blocks)
                    : launch<__half, 64>(context, all, n_blocks);
  } else {
    head_dim == 128 ? launch<__nv_bfloat16, 128>(context, all, n_blocks)
                    : launch<__nv_bfloat16, 64>(context, all, n_blocks);
  }
}

}  // namespace spindle::kernels::prefill
