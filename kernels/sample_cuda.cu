// Three kernels for all rows of a step. The first two share a row among blocks of 4,096 logits:
//   best_of_slices   penalties, bias and mask; the best logit; rows with any of those are copied
//   weigh_slices     weights; their mass per slice, and for top_k and top_p a histogram of the row
//   choose           one block per row: the draw
// Weights are the CPU's own (exp_weight), as integers of 2^-44: sums do not depend on their order,
// so a row has one result whatever the launch. A logit more than 32 temperatures below the best has
// weight zero; together such tokens have less than 1e-8 of the mass.
//
// top_k and top_p need no sorted row: every limit, and the draw itself, is the first place in the
// order (logit descending, id ascending) at which a count or mass is reached. It is found in the
// histogram, then in ever finer histograms of the bin that holds it, down to one value; only ids
// of equal values remain. The tokens up to the limit are first copied to shared memory if they fit.

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/sample_row.cuh"
#include "kernels/sample.h"

namespace spindle::kernels {
namespace sampling {
namespace {

__device__ float adjusted(float logit, const SampleParams& params,
                          const DeviceSampleAdjust& adjust) {
  if (adjust.seen != 0 && params.repetition_penalty != 1.0F) {
    logit = logit > 0.0F ? __fdiv_rn(logit, params.repetition_penalty)
                         : __fmul_rn(logit, params.repetition_penalty);
  }
  if (adjust.n_output > 0 &&
      (params.presence_penalty != 0.0F || params.frequency_penalty != 0.0F)) {
    const float charge =
        __fadd_rn(params.presence_penalty,
                  __fmul_rn(params.frequency_penalty, static_cast<float>(adjust.n_output)));
    logit = __fsub_rn(logit, charge);
  }
  if (adjust.bias != 0.0F) logit = __fadd_rn(logit, adjust.bias);
  return adjust.banned != 0 ? -INFINITY : logit;
}

__global__ __launch_bounds__(kSliceThreads) void best_of_slices(const Arguments a) {
  __shared__ float slice[kSlice];
  __shared__ U64 warp_best[kSliceThreads / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const unsigned index = blockIdx.y;
  const DeviceSampleRow& row = a.rows[index];
  const int begin = static_cast<int>(blockIdx.x) * kSlice;
  const float* logits = a.logits + row.logits_row * a.stride + begin;
  const int n = min(kSlice, a.n_vocab - begin);
  float values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kSliceThreads;
    values[i] = at < n ? logits[at] : -INFINITY;
  }
  if (row.n_adjust > 0) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) slice[threadIdx.x + i * kSliceThreads] = values[i];
    __syncthreads();
    const DeviceSampleAdjust* adjusts = a.adjusts + row.first_adjust;
    for (int i = static_cast<int>(threadIdx.x); i < row.n_adjust; i += kSliceThreads) {
      const DeviceSampleAdjust adjust = adjusts[i];
      const int at = adjust.id - begin;
      if (adjust.id >= begin && at < n) slice[at] = adjusted(slice[at], row.params, adjust);
    }
    __syncthreads();
    float* out = a.workspace.adjusted + std::int64_t{index} * a.n_vocab + begin;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kSliceThreads;
      values[i] = slice[at];
      if (at < n) out[at] = values[i];
    }
  }
  U64 best = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kSliceThreads;
    if (at >= n) continue;
    const U64 entry = U64{key_of(values[i])} << 32 | ~static_cast<U32>(begin + at);
    best = max(best, isnan(values[i]) ? kNan : entry);
  }
  best = warp_max(best);
  if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = best;
  for (int bin = static_cast<int>(blockIdx.x * kSliceThreads + threadIdx.x); bin < kBins;
       bin += static_cast<int>(gridDim.x) * kSliceThreads) {
    a.workspace.bin_mass[index * kBins + bin] = 0;
    a.workspace.bin_count[index * kBins + bin] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kSliceThreads / 32; ++i) best = max(best, warp_best[i]);
    a.workspace.best[index * a.n_slices + blockIdx.x] = best;
  }
}

__global__ __launch_bounds__(kSliceThreads) void weigh_slices(const Arguments a) {
  __shared__ Histogram histogram;
  __shared__ U64 warp_mass[kSliceThreads / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const unsigned index = blockIdx.y;
  const DeviceSampleRow& row = a.rows[index];
  const Start start = start_of(a, row, index);
  if (start.decided) return;
  const bool ranked = is_ranked(row.params, a.n_vocab);
  if (ranked) {
    histogram.clear();
    __syncthreads();
  }
  const int begin = static_cast<int>(blockIdx.x) * kSlice;
  const float* logits = row_of(a, row, index) + begin;
  const int n = min(kSlice, a.n_vocab - begin);
  float values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kSliceThreads;
    values[i] = at < n ? logits[at] : -INFINITY;
  }
  const float min_p = row.params.min_p;
  U64 kept = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float weight = start.softmax.weight(values[i]);
    const U64 mass = Softmax::mass_of(weight);
    if (!(weight < min_p)) kept += mass;
    if (!ranked) continue;
    const int bin = start.softmax.bin(values[i]);
    if (bin < kBins) histogram.add(bin, mass);
  }
  kept = warp_sum(kept);
  if (threadIdx.x % 32 == 0) warp_mass[threadIdx.x / 32] = kept;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kSliceThreads / 32; ++i) kept += warp_mass[i];
    a.workspace.mass[index * a.n_slices + blockIdx.x] = kept;
  }
  if (!ranked) return;
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kSliceThreads) {
    if (histogram.count[bin] == 0) continue;
    atomicAdd(&a.workspace.bin_count[index * kBins + bin], histogram.count[bin]);
    atomicAdd(&a.workspace.bin_mass[index * kBins + bin], histogram.mass(bin));
  }
}

__global__ __launch_bounds__(kThreads) void choose(const Arguments a) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const unsigned index = blockIdx.x;
  const DeviceSampleRow& row = a.rows[index];
  const Start start = start_of(a, row, index);
  int token = start.best_id;
  if (!start.decided) {
    Chooser chooser(a, row, start, index, *reinterpret_cast<Shared*>(shared_bytes));
    token = is_ranked(row.params, a.n_vocab) ? chooser.draw_ranked() : chooser.draw_plain();
  }
  if (threadIdx.x == 0) a.sampled[index] = DeviceSampled{token, 0};
}

static_assert(sizeof(Shared) <= 48 * 1024, "what every device has");

int slices(std::int64_t n_vocab) { return static_cast<int>((n_vocab + kSlice - 1) / kSlice); }

// Sets the arrays from `memory` on; returns their size.
std::size_t lay_out(std::byte* memory, int n_rows, std::int64_t n_vocab, Workspace& workspace) {
  std::size_t at = 0;
  const auto take = [&](auto*& array, std::int64_t per_row) {
    using T = std::remove_reference_t<decltype(*array)>;
    array = reinterpret_cast<T*>(memory + at);
    const std::size_t n_bytes =
        static_cast<std::size_t>(n_rows) * static_cast<std::size_t>(per_row) * sizeof(T);
    at += (n_bytes + 255) / 256 * 256;
  };
  take(workspace.best, slices(n_vocab));
  take(workspace.mass, slices(n_vocab));
  take(workspace.bin_mass, kBins);
  take(workspace.bin_count, kBins);
  take(workspace.adjusted, n_vocab);
  return at;
}

}  // namespace
}  // namespace sampling

std::size_t sample_workspace_bytes(int max_rows, std::int64_t n_vocab) {
  sampling::Workspace workspace;
  return sampling::lay_out(nullptr, max_rows, n_vocab, workspace);
}

void sample(const CudaContext& context, ConstRows logits, const DeviceSampleRow* rows, int n_rows,
            const DeviceSampleAdjust* adjusts, std::byte* workspace, std::size_t workspace_bytes,
            DeviceSampled* sampled) {
  if (n_rows == 0) return;
  CHECK(n_rows > 0 && n_rows <= 65535, "rows to sample");
  CHECK(logits.width > 0 && logits.width <= sampling::kMaxVocab, "vocabulary to sample from");
  sampling::Arguments a = {};
  CHECK(sampling::lay_out(workspace, n_rows, logits.width, a.workspace) <= workspace_bytes,
        "workspace of sample");
  a.logits = logits.data;
  a.stride = logits.stride;
  a.rows = rows;
  a.adjusts = adjusts;
  a.sampled = sampled;
  a.n_vocab = static_cast<int>(logits.width);
  a.n_slices = sampling::slices(logits.width);
  const dim3 by_slice(static_cast<unsigned>(a.n_slices), static_cast<unsigned>(n_rows));
  launch_chained(context, "best of slices", sampling::best_of_slices, by_slice,
                 dim3(sampling::kSliceThreads), 0, a);
  launch_chained(context, "weigh slices", sampling::weigh_slices, by_slice,
                 dim3(sampling::kSliceThreads), 0, a);
  launch_chained(context, "choose", sampling::choose, dim3(static_cast<unsigned>(n_rows)),
                 dim3(sampling::kThreads), sizeof(sampling::Shared), a);
}

}  // namespace spindle::kernels
