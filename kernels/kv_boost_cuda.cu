// The boost of DefensiveKV's scores (kv_score.h), one block a head.
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/block_rank.cuh"
#include "kernels/cuda/kv_score_device.cuh"

namespace spindle::kernels {
namespace {

constexpr double kBoostedMass = 0.9;
constexpr float kOwnShare = 1e-3F;

// Of a head's tokens in descending order of mean attention, those before the point
// where the means add up to a target. Radix passes as in select_top_k, by mass: a bin's mass is
// exact, from integer sums of the bits below its own.

constexpr int kBins = 2048;

struct MassBins {
  std::uint32_t count[kBins];
  std::uint32_t low[kBins];   // sums of bits 0..9 below the bin's
  std::uint32_t high[kBins];  // sums of bits 10..
};

// The sum of `count` positive floats that share the bits above `shift`, whose bits below add up to
// `rest`; `prefix` are those shared bits.
__device__ inline double mass_of(std::uint32_t prefix, int shift, std::uint32_t count,
                                 std::uint64_t rest) {
  const std::uint32_t bits = prefix << shift;
  const std::uint32_t exponent = bits >> 23;
  const std::uint64_t base = (bits & 0x7fffffU) | (exponent == 0 ? 0U : 0x800000U);
  return ldexp(static_cast<double>(base * count + rest),
               static_cast<int>(exponent == 0 ? 1 : exponent) - 150);
}

// The highest bin whose tokens are not all before the point, and what is before it.
struct Point {
  std::int32_t bin;  // -1: none
  std::int32_t count;
  double mass;
};

// Means are not negative, so their bits are in their order.
__global__ void __launch_bounds__(rank::kThreads, 1)
    boost_heads(const DeviceBoostHead* heads, std::int64_t max_boosted) {
  __shared__ MassBins bins;
  __shared__ std::uint64_t shared[rank::kWarps];
  __shared__ double shared_mass[rank::kWarps];
  __shared__ std::int32_t has_nan;
  __shared__ Point point;
  const DeviceBoostHead head = heads[blockIdx.x];
  const int n = head.n;
  const float* mean = head.means;
  const int limit = max_boosted < n ? static_cast<int>(max_boosted) : n;
  if (limit <= 0) return;

  double window_mass = 0.0;
  for (int row = threadIdx.x; row < head.n_window_rows; row += rank::kThreads) {
    window_mass += static_cast<double>(head.window_mass[row]);
  }
  window_mass = score::block_sum<rank::kThreads>(window_mass, shared_mass) / head.n_window_rows;
  double target = kBoostedMass - window_mass;
  if (threadIdx.x == 0) has_nan = 0;

  std::uint32_t prefix = 0;  // the point is among the keys that begin with it
  int count = 0;             // before them
  double mass = 0.0;
  int shift = 31;
  bool whole = false;  // all of them are before the point
  for (int pass = 0; pass < 3 && !whole; ++pass) {
    const int bits = pass < 2 ? 11 : 9;
    shift -= bits;
    for (int bin = threadIdx.x; bin < kBins; bin += rank::kThreads) {
      bins.count[bin] = 0;
      bins.low[bin] = 0;
      bins.high[bin] = 0;
    }
    if (threadIdx.x == 0) point.bin = -1;
    __syncthreads();
#pragma unroll 4
    for (int t = threadIdx.x; t < n; t += rank::kThreads) {
      const float x = mean[t];
      if (isnan(x)) has_nan = 1;
      const std::uint32_t key = __float_as_uint(x);
      if ((key >> (shift + bits)) != prefix) continue;
      const std::uint32_t bin = key >> shift & ((1U << bits) - 1);
      const std::uint32_t rest = key & ((1U << shift) - 1);
      atomicAdd(&bins.count[bin], 1U);
      if (shift > 0) atomicAdd(&bins.low[bin], rest & 0x3ffU);
      if (shift > 10) atomicAdd(&bins.high[bin], rest >> 10);
    }
    __syncthreads();
    if (has_nan != 0) return;
    // Each thread has two bins, from the top.
    const int upper = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    std::uint32_t counts[2];
    double masses[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bin = upper - i;
      counts[i] = bins.count[bin];
      const std::uint64_t rest = bins.low[bin] + (std::uint64_t{bins.high[bin]} << 10);
      masses[i] = mass_of(prefix << bits | static_cast<std::uint32_t>(bin), shift, counts[i], rest);
    }
    std::uint64_t total_count = 0;
    double total_mass = 0.0;
    int counts_before = count + static_cast<int>(rank::block_prefix(
                                    std::uint64_t{counts[0]} + counts[1], shared, &total_count));
    double mass_before = mass + rank::block_prefix(masses[0] + masses[1], shared_mass, &total_mass);
    if (pass == 0) target *= total_mass;
    double masses_before[2];
    int all_before[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      masses_before[i] = mass_before;
      all_before[i] = counts_before;
      mass_before += masses[i];
      counts_before += static_cast<int>(counts[i]);
      if (counts[i] > 0 && !(mass_before < target && counts_before <= limit)) {
        atomicMax(&point.bin, upper - i);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (point.bin == upper - i) {
        point.count = all_before[i];
        point.mass = masses_before[i];
      }
    }
    __syncthreads();
    whole = point.bin < 0;
    if (whole) {
      prefix <<= shift + bits;
    } else {
      prefix = prefix << bits | static_cast<std::uint32_t>(point.bin);
      count = point.count;
      mass = point.mass;
    }
    __syncthreads();
  }
  int ties = n;
  if (!whole) {
    // Of the tokens with the point's own mean, as many as stay below the target.
    const auto value = static_cast<double>(__uint_as_float(prefix));
    ties = limit - count;
    if (!(mass < target)) {
      ties = 0;
    } else if (mass + ties * value >= target) {
      ties = static_cast<int>(ceil((target - mass) / value)) - 1;
    }
  }
  const float best = *head.best;
  float* score = head.scores;
  rank::visit_kept(
      n, prefix, ties, shared, [&](int t) { return __float_as_uint(mean[t]); },
      [&](int t, int) { score[t] = best + kOwnShare * score[t]; });
}

}  // namespace

void defensive_boost(const CudaContext& context, const DeviceBoostHead* heads, int n_heads,
                     std::int64_t max_boosted) {
  if (n_heads == 0 || max_boosted <= 0) return;
  CHECK(n_heads > 0 && heads != nullptr, "defensive_boost heads");
  boost_heads<<<static_cast<unsigned>(n_heads), rank::kThreads, 0, context.stream()>>>(heads,
                                                                                       max_boosted);
  check_launch("boost_heads");
}

}  // namespace spindle::kernels
