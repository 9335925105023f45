// Prefill attention with mma.sync, for every supported device.
//
// Four warps of 32 rows each, 64 slots a step. Q stays in shared memory; K and V have one buffer
// each, so that K of the next step loads under the softmax and the product with V, and V under the
// product with K. Two thread blocks share a multiprocessor. Rows of pages are 64 bytes; their
// 16-byte chunks are permuted so that the 8 rows of a matrix fragment lie in different banks.

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/prefill_mma.cuh"
#include "kernels/cuda/prefill_work.cuh"

namespace spindle::kernels::prefill {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpRows = 32;
constexpr int kStepPages = kMmaStepSlots / kPageSlots;

template <int kDim>
struct MmaSmem {
  static constexpr int kQBytes = kMmaRows * kDim * 2;
  static constexpr int kSideBytes = kDim * 64;  // K or V of one page
  static constexpr int kBytes = kQBytes + 2 * kStepPages * kSideBytes;
};

// What a thread block works on.
struct TilePlace {
  PrefillSlots slots;
  int head;
  int item;
  int query_begin;
  int query_0_slot;
  int row0;
  int n_rows;  // of the sequence
  int begin;   // steps
  int end;
  int n_used;  // splits
};

// Rows past the last query are zeros.
template <typename T, int kDim>
__device__ void load_q(const PrefillParams& p, const TilePlace& place, std::uint32_t q_smem) {
  constexpr int kChunks = kDim / 8;
  const __half* q = p.q + std::int64_t{place.head} * p.group * kDim;
  for (int i = threadIdx.x; i < kMmaRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int r = place.row0 + row;
    const std::uint32_t target = q_smem + row * kDim * 2 + ((chunk ^ (row & 7)) << 4);
    uint4 value = make_uint4(0, 0, 0, 0);
    if (r < place.n_rows) {
      const std::int64_t token = place.query_begin + r / p.group;
      value = *reinterpret_cast<const uint4*>(q + token * p.q_stride + (r % p.group) * kDim +
                                              chunk * 8);
    }
    store_shared(target, as_page_type<T>(value));
  }
}

// K or V of the pages of a step; pages past the last are zeros.
template <int kDim>
__device__ void load_side(const std::byte* const (&pages)[kStepPages], int side_offset,
                          std::uint32_t smem) {
  constexpr int kSideBytes = MmaSmem<kDim>::kSideBytes;
  const std::uint32_t row = threadIdx.x >> 2;  // of 32 at a time: the permutation repeats every 8
  const std::uint32_t first = smem + row * 64 + (((threadIdx.x & 3) ^ ((row >> 1) & 3)) << 4);
#pragma unroll
  for (int page = 0; page < kStepPages; ++page) {
    const bool there = pages[page] != nullptr;
#pragma unroll
    for (int k = 0; k < kSideBytes / 16 / kThreads; ++k) {
      const std::uint32_t target = first + page * kSideBytes + k * kThreads * 16;
      if (there) {
        copy_async(target, pages[page] + side_offset + (threadIdx.x + k * kThreads) * 16);
      } else {
        store_shared(target, make_uint4(0, 0, 0, 0));
      }
    }
  }
}

// Memory of slots that nobody sees may hold anything, also NaN, and 0 * NaN would reach the sum.
template <int kDim>
__device__ void clear_hidden_values(std::uint32_t v_smem, int page, std::uint32_t visible) {
  for (int row = threadIdx.x; row < kDim; row += kThreads) {
    clear_hidden_row(v_smem + page * MmaSmem<kDim>::kSideBytes + row * 64, row, visible);
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    prefill_mma_kernel(const __grid_constant__ PrefillParams p) {
  constexpr int kSideBytes = MmaSmem<kDim>::kSideBytes;
  constexpr int kKTiles = kMmaStepSlots / 8;
  constexpr int kDTiles = kDim / 8;
  extern __shared__ __align__(1024) std::byte smem[];
  const std::uint32_t q_smem = shared_address(smem);
  const std::uint32_t k_smem = q_smem + MmaSmem<kDim>::kQBytes;
  const std::uint32_t v_smem = k_smem + kStepPages * kSideBytes;

  // In shared memory, because registers are what the kernel is short of.
  __shared__ TilePlace place;
  if (threadIdx.x == 0) {
    const PrefillItem item = prefill_item(p, blockIdx.x / p.n_splits);
    const DeviceSequence sequence = p.sequences[item.sequence];
    const int row0 = item.tile * kMmaRows;
    place.head = item.head;
    place.item = item.item;
    place.query_begin = sequence.query_begin;
    place.row0 = row0;
    place.n_rows = sequence.n_queries * p.group;
    place.begin = 0;
    place.end = 0;
    if (row0 < place.n_rows) {
      place.slots = prefill_slots(p, sequence, item.sequence, item.head);
      place.query_0_slot = query_slot(sequence, place.slots, 0);
      const int last_row = min(row0 + kMmaRows, place.n_rows) - 1;
      const int n_slots = place.query_0_slot + last_row / p.group + 1;
      const SplitRange range = split_range((n_slots + kMmaStepSlots - 1) / kMmaStepSlots,
                                           kMmaStepSlots, blockIdx.x % p.n_splits, p.n_splits);
      place.begin = range.begin;
      place.end = range.end;
      place.n_used = range.n_used;
    }
  }
  __syncthreads();
  if (place.begin >= place.end) return;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp * kWarpRows;
  const bool warp_idle = place.row0 + warp_row >= place.n_rows;

  // Addresses of the lane's rows of fragments: of Q in the first 16 channels of the warp's first 16
  // rows, of K in the first 8 tokens (V: 8 channels) of a page.
  const std::uint32_t q_lane =
      q_smem + (warp_row + (lane & 15)) * kDim * 2 + (((lane >> 4) ^ (lane & 7)) << 4);
  const std::uint32_t k_lane = k_smem + (lane & 7) * 64 + (((lane >> 3) ^ ((lane >> 1) & 3)) << 4);

  const std::byte* pages[kStepPages];
  const auto find_pages = [&](int step) {
#pragma unroll
    for (int i = 0; i < kStepPages; ++i) {
      const int page = step * kStepPages + i;
      pages[i] = nullptr;
      if (page >= place.slots.n_pages || step >= place.end) continue;
      pages[i] = (page < place.slots.n_blocks ? p.expanded : p.pool) +
                 place.slots.number(page) * std::int64_t{2 * kSideBytes};
    }
  };

  float o[2][kDTiles][4] = {};
  float row_max[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  float row_mass[4] = {};

  find_pages(place.begin);
  load_side<kDim>(pages, 0, k_smem);
  commit_async();
  load_q<T, kDim>(p, place, q_smem);

  for (int step = place.begin; step < place.end; ++step) {
    wait_async();
    __syncthreads();  // K of this step is there; V of the last is not read any more
    load_side<kDim>(pages, kSideBytes, v_smem);
    commit_async();

    float s[2][kKTiles][4] = {};
    if (!warp_idle) {
#pragma unroll 1
      for (int j = 0; j < kDim / 32; ++j) {
        std::uint32_t a[2][2][4];  // [tile of rows][16 channels]
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            load_matrices(a[m][k], (q_lane ^ ((j * 4 + k * 2) << 4)) + m * 16 * kDim * 2);
          }
        }
#pragma unroll
        for (int n = 0; n < kKTiles; ++n) {
          std::uint32_t b[4];
          load_matrices(b, k_lane + (n / 4) * kSideBytes + j * 2048 + (n % 4) * 512);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma<T>(s[m][n], a[m][0], b[0], b[1]);
            mma<T>(s[m][n], a[m][1], b[2], b[3]);
          }
        }
      }
    }

    wait_async();
    __syncthreads();  // V is there; K is not read any more
    find_pages(step + 1);
    load_side<kDim>(pages, 0, k_smem);
    commit_async();
    std::uint32_t visible[kStepPages];
    bool hidden = false;
#pragma unroll
    for (int i = 0; i < kStepPages; ++i) {
      const int page = step * kStepPages + i;
      visible[i] = page < place.slots.n_pages ? place.slots.visible(page) : 0U;
      if (visible[i] != 0xffffffffU) {
        hidden = true;
        clear_hidden_values<kDim>(v_smem, i, visible[i]);
      }
    }
    if (hidden) __syncthreads();
    if (warp_idle) continue;

    const int slot0 = step * kMmaStepSlots;
    // What all rows of the warp see, as far as it is visible.
    const int n_seen =
        place.query_0_slot + min(place.row0 + warp_row, place.n_rows - 1) / p.group + 1;
    if (hidden || slot0 + kMmaStepSlots > n_seen) {
      int last_slot[4];  // that the lane's rows see: rows g and g + 8 of two tiles of 16
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = place.row0 + warp_row + (i / 2) * 16 + (i % 2) * 8 + lane / 4;
        last_slot[i] = place.query_0_slot + min(row, place.n_rows - 1) / p.group;
      }
#pragma unroll
      for (int n = 0; n < kKTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n * 8 + (lane % 4) * 2 + e;
          const bool seen = (visible[n / 4] >> (column % 32)) & 1U;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!seen || slot0 + column > last_slot[i]) {
              s[i / 2][n][(i % 2) * 2 + e] = -INFINITY;
            }
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float best = row_max[i];
#pragma unroll
      for (int n = 0; n < kKTiles; ++n) {
        best = fmaxf(best, fmaxf(s[i / 2][n][(i % 2) * 2], s[i / 2][n][(i % 2) * 2 + 1]));
      }
      best = quad_max(best);
      const float shift = best == -INFINITY ? 0.0F : best * p.scale_log2;
      const float decay = exp2_approx(fmaf(row_max[i], p.scale_log2, -shift));
      row_max[i] = best;
      float mass = 0;
#pragma unroll
      for (int n = 0; n < kKTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[i / 2][n][(i % 2) * 2 + e];
          x = exp2_approx(fmaf(x, p.scale_log2, -shift));
          mass += x;
        }
      }
      row_mass[i] = row_mass[i] * decay + mass;
#pragma unroll
      for (int n = 0; n < kDTiles; ++n) {
        o[i / 2][n][(i % 2) * 2] *= decay;
        o[i / 2][n][(i % 2) * 2 + 1] *= decay;
      }
    }

#pragma unroll
    for (int page = 0; page < kStepPages; ++page) {
      std::uint32_t a[2][2][4];  // [tile of rows][16 slots]
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float(&left)[4] = s[m][page * 4 + k * 2];
          const float(&right)[4] = s[m][page * 4 + k * 2 + 1];
          a[m][k][0] = pack<T>(left[0], left[1]);
          a[m][k][1] = pack<T>(left[2], left[3]);
          a[m][k][2] = pack<T>(right[0], right[1]);
          a[m][k][3] = pack<T>(right[2], right[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDTiles; ++n) {
        std::uint32_t b[4];
        load_matrices(b, k_lane + (kStepPages + page) * kSideBytes + n * 512);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<T>(o[m][n], a[m][0], b[0], b[1]);
          mma<T>(o[m][n], a[m][1], b[2], b[3]);
        }
      }
    }
  }
  wait_async();
  if (warp_idle) return;

  const std::int64_t partial_row =
      (std::int64_t{place.item} * p.n_splits + blockIdx.x % p.n_splits) * kMmaRows + warp_row;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = (i / 2) * 16 + (i % 2) * 8 + lane / 4;
    const int r = place.row0 + warp_row + row;
    const float mass = quad_sum(row_mass[i]);
    if (r >= place.n_rows) continue;
    if (place.n_used > 1) {
      if (lane % 4 == 0) p.partial_mass[partial_row + row] = make_float2(row_max[i], mass);
      float* target = p.partial_out + (partial_row + row) * kDim + (lane % 4) * 2;
#pragma unroll
      for (int n = 0; n < kDTiles; ++n) {
        *reinterpret_cast<float2*>(target + n * 8) =
            make_float2(o[i / 2][n][(i % 2) * 2], o[i / 2][n][(i % 2) * 2 + 1]);
      }
    } else {
      const float inverse = 1.0F / mass;
      const std::int64_t token = place.query_begin + r / p.group;
      __nv_bfloat16* target = p.out + token * p.out_stride +
                              (std::int64_t{place.head} * p.group + r % p.group) * kDim +
                              (lane % 4) * 2;
#pragma unroll
      for (int n = 0; n < kDTiles; ++n) {
        *reinterpret_cast<__nv_bfloat162*>(target + n * 8) = __floats2bfloat162_rn(
            o[i / 2][n][(i % 2) * 2] * inverse, o[i / 2][n][(i % 2) * 2 + 1] * inverse);
      }
    }
  }
}

template <typename T, int kDim>
void launch_mma(const CudaContext& context, const PrefillParams& params, int n_items) {
  constexpr int kBytes = MmaSmem<kDim>::kBytes;
  cuda_check(cudaFuncSetAttribute(prefill_mma_kernel<T, kDim>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "shared memory of attention_prefill");
  prefill_mma_kernel<T, kDim>
      <<<static_cast<unsigned>(n_items * params.n_splits), kThreads, kBytes, context.stream()>>>(
          params);
  check_launch("attention_prefill (mma)");
}

}  // namespace

void launch_prefill_mma(const CudaContext& context, const PrefillParams& params, int head_dim,
                        DType dtype, int n_items) {
  if (dtype == DType::kF16) {
    head_dim == 128 ? launch_mma<__half, 128>(context, params, n_items)
                    : launch_mma<__half, 64>(context, params, n_items);
  } else {
    head_dim == 128 ? launch_mma<__nv_bfloat16, 128>(context, params, n_items)
                    : launch_mma<__nv_bfloat16, 64>(context, params, n_items);
  }
}

}  // namespace spindle::kernels::prefill
