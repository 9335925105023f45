// Prefill attention: what is launched, and the merge of splits. The kernels are in
// attention_prefill_mma_cuda.cu and attention_prefill_sm90_cuda.cu.

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/prefill_kernels.h"
#include "kernels/cuda/prefill_mma.cuh"
#include "kernels/cuda/prefill_work.cuh"

namespace spindle::kernels {
namespace prefill {
namespace {

constexpr int kMergeRows = 8;

// One warp a row; a lane has kDim / 32 neighbouring channels.
template <int kDim>
__global__ void __launch_bounds__(32 * kMergeRows)
    prefill_merge_kernel(const __grid_constant__ PrefillParams p, int step_slots) {
  constexpr int kLane = kDim / 32;
  const int blocks = p.tile_rows / kMergeRows;
  constexpr int kInFlight = 8;
  const PrefillItem item = prefill_item(p, blockIdx.x / blocks);
  const DeviceSequence sequence = p.sequences[item.sequence];
  const int row0 = item.tile * p.tile_rows;
  const int n_rows = sequence.n_queries * p.group;
  const int tile_row = blockIdx.x % blocks * kMergeRows + static_cast<int>(threadIdx.x) / 32;
  const int r = row0 + tile_row;
  // Tables are older than the kernel before, which starts this one after its own wait.
  int n_used = 0;
  if (r < n_rows) {
    const PrefillSlots slots = prefill_slots(p, sequence, item.sequence, item.head);
    const int last_row = min(row0 + p.tile_rows, n_rows) - 1;
    const int n_slots = query_slot(sequence, slots, last_row / p.group) + 1;
    n_used = split_range((n_slots + step_slots - 1) / step_slots, step_slots, 0, p.n_splits).n_used;
  }
  wait_for_previous_kernel();
  if (n_used < 2) return;

  const int lane = threadIdx.x % 32;
  const std::int64_t first_row = std::int64_t{item.item} * p.n_splits * p.tile_rows + tile_row;
  float2 part = make_float2(-INFINITY, 0.0F);
  if (lane < n_used) part = p.partial_mass[first_row + std::int64_t{lane} * p.tile_rows];
  // A split of which the row sees nothing has no weight; the row sees itself in one.
  float best = part.x;
  for (int k = 16; k > 0; k /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffU, best, k));
  const float weight = exp2_approx((part.x - best) * p.scale_log2);
  float mass = weight * part.y;
  for (int k = 16; k > 0; k /= 2) mass += __shfl_xor_sync(0xffffffffU, mass, k);
  float sum[kLane] = {};
  for (int first = 0; first < n_used; first += kInFlight) {
    float values[kInFlight][kLane];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int split = min(first + i, n_used - 1);
      const float* from =
          p.partial_out + (first_row + std::int64_t{split} * p.tile_rows) * kDim + lane * kLane;
#pragma unroll
      for (int c = 0; c < kLane; c += 2) {
        const float2 pair = *reinterpret_cast<const float2*>(from + c);
        values[i][c] = pair.x;
        values[i][c + 1] = pair.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const float w = __shfl_sync(0xffffffffU, weight, min(first + i, 31));
      if (first + i >= n_used) continue;
#pragma unroll
      for (int c = 0; c < kLane; ++c) sum[c] = fmaf(w, values[i][c], sum[c]);
    }
  }
  const std::int64_t token = sequence.query_begin + r / p.group;
  __nv_bfloat16* target = p.out + token * p.out_stride +
                          (std::int64_t{item.head} * p.group + r % p.group) * kDim + lane * kLane;
#pragma unroll
  for (int c = 0; c < kLane; c += 2) {
    *reinterpret_cast<__nv_bfloat162*>(target + c) =
        __floats2bfloat162_rn(sum[c] / mass, sum[c + 1] / mass);
  }
}

}  // namespace

void merge_splits(const CudaContext& context, const PrefillParams& params, int head_dim,
                  int step_slots, int n_items) {
  launch_chained(context, "attention_prefill (merge)",
                 head_dim == 128 ? prefill_merge_kernel<128> : prefill_merge_kernel<64>,
                 n_items * (params.tile_rows / kMergeRows), 32 * kMergeRows, 0, params, step_slots);
}

namespace {

constexpr std::size_t kQueueBytes = 256;

// The number of splits with the least time, if all items were equally long. Thread blocks of a
// launch run n_slots at a time; each split costs a little more than its share.
int choose_splits(std::int64_t n_items, std::int64_t n_resident, std::int64_t most) {
  int best = 1;
  double best_time = 0;
  for (int n = 1; n <= most; ++n) {
    const auto waves = static_cast<double>((n_items * n + n_resident - 1) / n_resident);
    const double time = waves / n * (1.0 + 0.02 * n);
    if (n == 1 || time < 0.95 * best_time) {
      best = n;
      best_time = time;
    }
  }
  return best;
}

}  // namespace
}  // namespace prefill

PrefillKernel best_prefill_kernel(const CudaContext& context) {
  // The instructions are of 9.0 alone: later devices do not run them.
  return context.compute_capability() == 90 ? PrefillKernel::kWgmma : PrefillKernel::kMma;
}

void attention_prefill(const CudaContext& context, ConstF16Rows q,
                       std::span<const std::int32_t> n_queries, const DeviceSequence* sequences,
                       int layer, const AttentionShape& shape, const DeviceKvPool& pool,
                       float scale, const DeviceExpandedBlocks& expanded, Bf16Rows out) {
  attention_prefill_with(best_prefill_kernel(context), context, q, n_queries, sequences, layer,
                         shape, pool, scale, expanded, out);
}

void attention_prefill_with(PrefillKernel kernel, const CudaContext& context, ConstF16Rows q,
                            std::span<const std::int32_t> n_queries,
                            const DeviceSequence* sequences, int layer, const AttentionShape& shape,
                            const DeviceKvPool& pool, float scale,
                            const DeviceExpandedBlocks& expanded, Bf16Rows out) {
  using namespace prefill;
  const int head_dim = shape.head_dim;
  CHECK(head_dim == 64 || head_dim == 128, "attention_prefill: head_dim is 64 or 128");
  CHECK(shape.n_kv_heads > 0 && shape.n_heads > 0 && shape.n_heads % shape.n_kv_heads == 0,
        "attention shape");
  CHECK(pool.layout.head_dim == head_dim && pool.layout.page_tokens == kPageSlots &&
            pool.layout.dtype != DType::kF32,
        "attention_prefill: page layout");
  const std::int64_t width = std::int64_t{shape.n_heads} * head_dim;
  CHECK(q.width == width && out.width == width && q.n_rows == out.n_rows, "attention rows");
  CHECK(reinterpret_cast<std::uintptr_t>(q.data) % 16 == 0 && q.stride % 8 == 0 &&
            reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0 && out.stride % 8 == 0,
        "attention_prefill: rows at multiples of 16 bytes");
  CHECK(scale > 0, "attention_prefill: scale");

  const bool wgmma = kernel == PrefillKernel::kWgmma;
  CHECK(!wgmma || best_prefill_kernel(context) == PrefillKernel::kWgmma,
        "attention_prefill: this device has no wgmma");

  PrefillParams params;
  params.q = reinterpret_cast<const __half*>(q.data);
  params.q_stride = q.stride;
  params.out = reinterpret_cast<__nv_bfloat16*>(out.data);
  params.out_stride = out.stride;
  params.sequences = sequences;
  params.pool = pool.base;
  params.expanded = expanded.pages;
  params.expanded_first = expanded.first_page;
  params.scale_log2 = scale * 1.44269504F;
  params.layer = layer;
  params.n_kv_heads = shape.n_kv_heads;
  params.group = shape.n_heads / shape.n_kv_heads;
  params.tile_rows = wgmma ? wgmma_rows(head_dim) : kMmaRows;

  const int step_slots = wgmma ? kWgmmaStepSlots : kMmaStepSlots;
  const int resident = context.n_multiprocessors() * (wgmma ? 1 : 2);
  const auto n_sequences = static_cast<int>(n_queries.size());
  for (int first = 0; first < n_sequences;) {
    params.n_sequences = 0;
    params.n_tiles = 0;
    for (; first < n_sequences && params.n_sequences < kMaxLaunchSequences; ++first) {
      const std::int64_t n = n_queries[static_cast<std::size_t>(first)];
      CHECK(n >= 0 && n <= q.n_rows, "attention_prefill: queries of a sequence");
      if (n == 0) continue;
      params.n_tiles +=
          static_cast<int>((n * params.group + params.tile_rows - 1) / params.tile_rows);
      params.sequence[params.n_sequences] = first;
      params.tile_end[params.n_sequences++] = params.n_tiles;
    }
    if (params.n_tiles == 0) continue;
    const int n_items = params.n_tiles * params.n_kv_heads;

    // The queue and partial results are in the stream's workspace, which is free between two
    // products.
    const std::size_t split_bytes =
        static_cast<std::size_t>(params.tile_rows) *
        (static_cast<std::size_t>(head_dim) * sizeof(float) + sizeof(float2));
    const std::size_t room = (context.blas_workspace_bytes() - kQueueBytes) / split_bytes;
    const std::int64_t most = static_cast<std::int64_t>(room) / n_items;
    params.n_splits = choose_splits(n_items, resident, most < kMaxSplits ? most : kMaxSplits);
    params.partial_out = reinterpret_cast<float*>(context.blas_workspace() + kQueueBytes);
    params.partial_mass = reinterpret_cast<float2*>(
        params.partial_out + std::int64_t{n_items} * params.n_splits * params.tile_rows * head_dim);

    if (wgmma) {
      const int n_units = n_items * params.n_splits;
      if (n_units > resident) {
        params.queue = reinterpret_cast<int*>(context.blas_workspace());
        context.fill(params.queue, 0, sizeof(int));
      } else {
        params.queue = nullptr;
      }
      launch_prefill_wgmma(context, params, head_dim, pool.layout.dtype,
                           n_units < resident ? n_units : resident);
    } else {
      launch_prefill_mma(context, params, head_dim, pool.layout.dtype, n_items);
    }
    if (params.n_splits > 1) merge_splits(context, params, head_dim, step_slots, n_items);
  }
}

}  // namespace spindle::kernels
