#pragma once
// Ranking of one row of scores by one block: radix passes over keys in shared histograms, block
// scans. Rows may be as long as kMaxRankedRow.

#include <cuda_runtime.h>

#include <cstdint>

namespace spindle::kernels::rank {

inline constexpr int kThreads = 1024;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kMaxRankedRow = 1 << 24;

// Unsigned integers in the order of the scores: NaN 0, then -infinity to infinity, both zeros
// equal.
__device__ inline std::uint32_t order_of(float score) {
  if (isnan(score)) return 0;
  const std::uint32_t bits = __float_as_uint(score + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

template <typename T>
__device__ T warp_prefix(T value) {  // inclusive
  const int lane = threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(0xffffffffU, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Exclusive prefix of the threads' values; *total is their sum. `shared` holds kWarps values and
// may be used again at once.
template <typename T>
__device__ T block_prefix(T value, T* shared, T* total) {
  const T inclusive = warp_prefix(value);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 31) shared[warp] = inclusive;
  __syncthreads();
  // Every warp scans the warps' totals itself.
  const T warps = warp_prefix(shared[threadIdx.x % 32]);
  *total = __shfl_sync(0xffffffffU, warps, 31);
  const T before = __shfl_sync(0xffffffffU, warps, (warp + 31) % 32);
  __syncthreads();
  return (warp == 0 ? T{0} : before) + inclusive - value;
}

// Visits what is kept of a row in ascending order of position: every key above `threshold` and the
// first `ties` of those equal to it. key(t) is the key of position t; keep(t, place) gets the
// running number of what is kept. `shared` as in block_prefix. All threads call it.
template <typename Key, typename Keep>
__device__ void visit_kept(int n, std::uint32_t threshold, int ties, std::uint64_t* shared, Key key,
                           Keep keep) {
  constexpr int kPerThread = 4;
  std::uint64_t before = 0;  // above << 32 | equal
  for (int chunk = 0; chunk < n; chunk += kThreads * kPerThread) {
    const int first = chunk + static_cast<int>(threadIdx.x) * kPerThread;
    std::uint64_t flags[kPerThread];
    std::uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      flags[i] = 0;
      if (first + i < n) {
        const std::uint32_t k = key(first + i);
        flags[i] = k > threshold ? std::uint64_t{1} << 32 : k == threshold ? 1 : 0;
      }
      own += flags[i];
    }
    std::uint64_t total = 0;
    std::uint64_t at = before + block_prefix(own, shared, &total);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const auto above = static_cast<int>(at >> 32);
      const auto equal = static_cast<int>(at & 0xffffffffU);
      const bool is_tie = flags[i] == 1;
      if (flags[i] > 1 || (is_tie && equal < ties)) keep(first + i, above + min(equal, ties));
      at += flags[i];
    }
    before += total;
  }
}

}  // namespace spindle::kernels::rank
