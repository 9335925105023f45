// Selection: one block a row. Three radix passes find the k-th key, the last pass writes what is
// kept in order. Rows come from the L2 cache after the first pass.
#include "kernels/kv_select.h"

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/block_rank.cuh"

namespace spindle::kernels {
namespace {

using rank::kThreads;
using rank::kWarps;

// A pass decides 11, 11 and 10 bits of the key, from the top.
constexpr int kPasses = 3;
constexpr int kBins = 1 << 11;

__global__ void __launch_bounds__(kThreads) select_rows(const DeviceSelect* rows) {
  __shared__ std::uint32_t histogram[kBins];
  __shared__ std::uint64_t shared[kWarps];
  __shared__ std::uint32_t found_prefix;
  __shared__ std::int32_t found_left;
  const DeviceSelect row = rows[blockIdx.x];
  const int k = min(row.k, row.n);
  if (k <= 0) return;
  if (k == row.n) {
    for (int t = threadIdx.x; t < row.n; t += kThreads) row.kept[t] = t + row.add;
    return;
  }
  // The keys that agree with `prefix` above `shift` hold the k-th; `left` of them are kept.
  std::uint32_t prefix = 0;
  int left = k;
  int shift = 32;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int bits = pass < 2 ? 11 : 10;
    shift -= bits;
    const std::uint32_t mask = (1U << bits) - 1;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
#pragma unroll 4
    for (int t = threadIdx.x; t < row.n; t += kThreads) {
      const std::uint32_t key = rank::order_of(row.scores[t]);
      if ((static_cast<std::uint64_t>(key) >> (shift + bits)) == prefix) {
        atomicAdd(&histogram[key >> shift & mask], 1U);
      }
    }
    __syncthreads();
    // Each thread has two bins, from the top.
    const int upper = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    const std::uint64_t upper_count = histogram[upper];
    const std::uint64_t lower_count = histogram[upper - 1];
    std::uint64_t total = 0;
    const std::uint64_t above = rank::block_prefix(upper_count + lower_count, shared, &total);
    const auto wanted = static_cast<std::uint64_t>(left);
    if (above < wanted && above + upper_count + lower_count >= wanted) {
      const bool in_upper = above + upper_count >= wanted;
      const int bin = in_upper ? upper : upper - 1;
      found_prefix = prefix << bits | static_cast<std::uint32_t>(bin);
      found_left = left - static_cast<int>(in_upper ? above : above + upper_count);
    }
    __syncthreads();
    prefix = found_prefix;
    left = found_left;
  }
  rank::visit_kept(
      row.n, prefix, left, shared, [&](int t) { return rank::order_of(row.scores[t]); },
      [&](int t, int place) { row.kept[place] = t + row.add; });
}

// The dense histogram lies in shared memory; its non-empty bins leave in order.
__global__ void __launch_bounds__(kThreads)
    histogram_rows(const DeviceSelect* rows, DeviceHistograms out) {
  extern __shared__ std::uint32_t counts[];
  __shared__ std::uint32_t shared[kWarps];
  __shared__ std::uint32_t first_entry;
  const DeviceSelect row = rows[blockIdx.x];
  for (int bin = threadIdx.x; bin < kScoreHistogramBins; bin += kThreads) counts[bin] = 0;
  __syncthreads();
#pragma unroll 4
  for (int t = threadIdx.x; t < row.n; t += kThreads) {
    const float score = row.scores[t];
    atomicAdd(&counts[score > 0.0F ? __float_as_uint(score) >> 16 : 0], 1U);
  }
  __syncthreads();
  constexpr int kPerThread = kScoreHistogramBins / kThreads;
  // Thread i has the bins 32 i .. 32 i + 31, taken in turns so that lanes meet different banks.
  const int first_bin = static_cast<int>(threadIdx.x) * kPerThread;
  std::uint32_t present = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int bin = (i + static_cast<int>(threadIdx.x)) % kPerThread;
    present |= (counts[first_bin + bin] != 0 ? 1U : 0U) << bin;
  }
  std::uint32_t total = 0;
  const std::uint32_t place =
      rank::block_prefix(static_cast<std::uint32_t>(__popc(present)), shared, &total);
  if (threadIdx.x == 0) {
    first_entry = atomicAdd(out.n_entries, total);
    out.begin[blockIdx.x] = first_entry;
    out.size[blockIdx.x] = total;
  }
  __syncthreads();
  std::int64_t at = static_cast<std::int64_t>(first_entry) + place;
  for (; present != 0; present &= present - 1, ++at) {
    const int bin = first_bin + __ffs(static_cast<int>(present)) - 1;
    if (at < out.capacity) out.entries[at] = {static_cast<std::uint32_t>(bin), counts[bin]};
  }
}

}  // namespace

void select_top_k(const CudaContext& context, const DeviceSelect* rows, int n_rows) {
  if (n_rows == 0) return;
  CHECK(n_rows > 0 && rows != nullptr, "select_top_k rows");
  select_rows<<<static_cast<unsigned>(n_rows), kThreads, 0, context.stream()>>>(rows);
  check_launch("select_rows");
}

void score_histogram(const CudaContext& context, const DeviceSelect* rows, int n_rows,
                     const DeviceHistograms& out) {
  context.fill(out.n_entries, 0, sizeof(std::uint32_t));
  if (n_rows == 0) return;
  CHECK(n_rows > 0 && rows != nullptr && out.capacity >= 0, "score_histogram rows");
  constexpr int kBytes = kScoreHistogramBins * static_cast<int>(sizeof(std::uint32_t));
  cuda_check(
      cudaFuncSetAttribute(histogram_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  histogram_rows<<<static_cast<unsigned>(n_rows), kThreads, kBytes, context.stream()>>>(rows, out);
  check_launch("histogram_rows");
}

}  // namespace spindle::kernels
