// DefensiveKV's scores (kv_score.h): row masses, pooled maxima with column means, floor and norm,
// then the layer's boost. The probabilities are read twice.
#include "kernels/cuda/block_rank.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/kv_score_device.cuh"

namespace spindle::kernels {
namespace {

using score::Layer;

constexpr int kRowThreads = 256;
// Columns of a block: 64 threads of 4 columns, times 4 shares of the rows.
constexpr int kColumnThreads = 64;
constexpr int kRowShares = 4;
constexpr int kBlockColumns = 4 * kColumnThreads;
constexpr int kColumnBlockThreads = kColumnThreads * kRowShares;
constexpr int kFinishThreads = 256;
constexpr double kBoostedMass = 0.9;
constexpr float kOwnShare = 1e-3F;

// In the workspace.
struct Work {
  double* floor_parts;       // [kv heads][blocks of columns], sums of the maxima
  float* factor;             // [n_heads * n_queries]
  float* window_mass;        // [n_heads * n_queries]
  float* mean;               // [kv heads][stride]
  std::uint32_t* best_bits;  // the layer's highest score
  std::int64_t stride;
  std::int32_t n_blocks;
};

std::int64_t column_blocks(std::int64_t stride) {
  return (stride + kBlockColumns - 1) / kBlockColumns;
}

// One block a row: what turns sums over five columns into pooled values of the row's mass before
// the window, and the mass in the window.
__global__ void __launch_bounds__(kRowThreads)
    row_masses(const Layer layer, ConstRows p, const Work work) {
  __shared__ double shared[kRowThreads / 32];
  const int row = blockIdx.x;
  const int n_slots = layer.n_slots[row / (layer.group * layer.n_queries)];
  const int n = n_slots - layer.n_queries;
  const float* x = p.data + static_cast<std::int64_t>(row) * p.stride;
  double mass = 0.0;
#pragma unroll 4
  for (int t = 4 * static_cast<int>(threadIdx.x); t < n / 4 * 4; t += 4 * kRowThreads) {
    const float4 v = *reinterpret_cast<const float4*>(x + t);
    mass += static_cast<double>((v.x + v.y) + (v.z + v.w));
  }
  if (threadIdx.x < n % 4) mass += static_cast<double>(x[n / 4 * 4 + threadIdx.x]);
  mass = score::block_sum<kRowThreads>(mass, shared);
  double window = 0.0;
  for (int t = n + static_cast<int>(threadIdx.x); t < n_slots; t += kRowThreads) {
    window += static_cast<double>(x[t]);
  }
  window = score::block_sum<kRowThreads>(window, shared);
  if (threadIdx.x != 0) return;
  if (row == 0) *work.best_bits = 0;
  // Each value counts in five windows, less those that would be centred outside.
  double lost = 0.0;
  for (int i = 0; i < min(2, n); ++i) {
    lost += static_cast<double>(2 - i) *
            (static_cast<double>(x[i]) + static_cast<double>(x[n - 1 - i]));
  }
  const double pooled = mass - lost / 5.0;
  work.factor[row] = pooled > 0.0 ? static_cast<float>(mass / (5.0 * pooled)) : 0.0F;
  work.window_mass[row] = static_cast<float>(window);
}

// max over rows of the pooled values into scores, mean over rows, and the maxima's sum.
__global__ void __launch_bounds__(kColumnBlockThreads)
    pooled_maxima(const Layer layer, ConstRows p, const Work work, Rows scores) {
  __shared__ float4 best_of[kRowShares][kColumnThreads];
  __shared__ float4 sum_of[kRowShares][kColumnThreads];
  __shared__ double shared[kColumnBlockThreads / 32];
  const int kv_head = blockIdx.y;
  const int n_rows = layer.group * layer.n_queries;
  const int n = layer.n_slots[kv_head] - layer.n_queries;
  const int column_thread = threadIdx.x % kColumnThreads;
  const int share = threadIdx.x / kColumnThreads;
  const int t = blockIdx.x * kBlockColumns + 4 * column_thread;
  const float* first_row = p.data + static_cast<std::int64_t>(kv_head) * n_rows * p.stride;
  const float* factors = work.factor + static_cast<std::int64_t>(kv_head) * n_rows;

  float best[4] = {};
  float sum[4] = {};
  if (t < n) {
    const bool inside = t >= 2 && t + 6 <= n;
#pragma unroll 4
    for (int row = share; row < n_rows; row += kRowShares) {
      const float* x = first_row + row * p.stride + t;
      float v[8];  // columns t - 2 .. t + 5
      if (inside) {
        const float2 before = *reinterpret_cast<const float2*>(x - 2);
        const float4 own = *reinterpret_cast<const float4*>(x);
        const float2 after = *reinterpret_cast<const float2*>(x + 4);
        v[0] = before.x;
        v[1] = before.y;
        v[2] = own.x;
        v[3] = own.y;
        v[4] = own.z;
        v[5] = own.w;
        v[6] = after.x;
        v[7] = after.y;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int column = t + i - 2;
          v[i] = column >= 0 && column < n ? x[i - 2] : 0.0F;
        }
      }
      const float factor = factors[row];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float pooled = ((v[i] + v[i + 1]) + v[i + 2]) + (v[i + 3] + v[i + 4]);
        best[i] = fmaxf(best[i], pooled * factor);  // leaves NaN out
        sum[i] += v[i + 2];
      }
    }
  }
  best_of[share][column_thread] = make_float4(best[0], best[1], best[2], best[3]);
  sum_of[share][column_thread] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  __syncthreads();
  double maxima = 0.0;
  if (share == 0 && t < n) {
    for (int i = 1; i < kRowShares; ++i) {
      const float4 b = best_of[i][column_thread];
      const float4 s = sum_of[i][column_thread];
      best[0] = fmaxf(best[0], b.x);
      best[1] = fmaxf(best[1], b.y);
      best[2] = fmaxf(best[2], b.z);
      best[3] = fmaxf(best[3], b.w);
      sum[0] += s.x;
      sum[1] += s.y;
      sum[2] += s.z;
      sum[3] += s.w;
    }
    const auto divisor = static_cast<float>(n_rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (t + i >= n) continue;
      scores.data[static_cast<std::int64_t>(kv_head) * scores.stride + t + i] = best[i];
      work.mean[static_cast<std::int64_t>(kv_head) * work.stride + t + i] = sum[i] / divisor;
      maxima += static_cast<double>(best[i]);
    }
  }
  maxima = score::block_sum<kColumnBlockThreads>(maxima, shared);
  if (threadIdx.x == 0) {
    work.floor_parts[static_cast<std::int64_t>(kv_head) * work.n_blocks + blockIdx.x] = maxima;
  }
}

// Not below the head's mean of maxima, times the norm; and the layer's highest score.
__global__ void __launch_bounds__(kFinishThreads)
    apply_floor_and_norms(const Layer layer, const Work work, ConstRows norms, int first_norm,
                          Rows scores) {
  __shared__ double shared[kFinishThreads / 32];
  const int kv_head = blockIdx.y;
  const int n = layer.n_slots[kv_head] - layer.n_queries;
  double sum = 0.0;
  for (int i = threadIdx.x; i < work.n_blocks; i += kFinishThreads) {
    sum += work.floor_parts[static_cast<std::int64_t>(kv_head) * work.n_blocks + i];
  }
  const auto floor =
      static_cast<float>(score::block_sum<kFinishThreads>(sum, shared) / static_cast<double>(n));
  const int without_norm = layer.n_slots[kv_head] - (layer.n_tokens - first_norm);
  float best = 0.0F;
  const int t = blockIdx.x * kFinishThreads + threadIdx.x;
  if (t < n) {
    const float norm =
        t >= without_norm
            ? norms.data[static_cast<std::int64_t>(kv_head) * norms.stride + t - without_norm]
            : 0.0F;
    float& score = scores.data[static_cast<std::int64_t>(kv_head) * scores.stride + t];
    score = (score < floor ? floor : score) * norm;
    best = fmaxf(score, 0.0F);  // leaves NaN out
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    best = fmaxf(best, __shfl_xor_sync(0xffffffffU, best, distance));
  }
  // Scores are not negative, so their bits are in their order.
  if (threadIdx.x % 32 == 0 && best > 0.0F) atomicMax(work.best_bits, __float_as_uint(best));
}

// ---- The boost: of a head's tokens in descending order of mean attention, those before the point
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
__global__ void __launch_bounds__(rank::kThreads)
    boost_heads(const Layer layer, const Work work, std::int64_t max_boosted, Rows scores) {
  __shared__ MassBins bins;
  __shared__ std::uint64_t shared[rank::kWarps];
  __shared__ double shared_mass[rank::kWarps];
  __shared__ std::int32_t has_nan;
  __shared__ Point point;
  const int kv_head = blockIdx.x;
  const int n = layer.n_slots[kv_head] - layer.n_queries;
  const float* mean = work.mean + static_cast<std::int64_t>(kv_head) * work.stride;
  const int limit = max_boosted < n ? static_cast<int>(max_boosted) : n;
  if (limit <= 0) return;

  double window_mass = 0.0;
  const int n_rows = layer.n_heads * layer.n_queries;
  for (int row = threadIdx.x; row < n_rows; row += rank::kThreads) {
    window_mass += static_cast<double>(work.window_mass[row]);
  }
  window_mass = score::block_sum<rank::kThreads>(window_mass, shared_mass) / n_rows;
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
  const float best = __uint_as_float(*work.best_bits);
  float* score = scores.data + static_cast<std::int64_t>(kv_head) * scores.stride;
  rank::visit_kept(
      n, prefix, ties, shared, [&](int t) { return __float_as_uint(mean[t]); },
      [&](int t, int) { score[t] = best + kOwnShare * score[t]; });
}

std::size_t rounded(std::size_t n_bytes) { return (n_bytes + 255) / 256 * 256; }

}  // namespace

std::size_t defensive_workspace_bytes(const AttentionShape& shape, std::int64_t stride) {
  const auto n_kv_heads = static_cast<std::size_t>(shape.n_kv_heads);
  const auto n_rows = static_cast<std::size_t>(shape.n_heads) * kMaxScoreQueries;
  return rounded(n_kv_heads * static_cast<std::size_t>(column_blocks(stride)) * sizeof(double)) +
         2 * rounded(n_rows * sizeof(float)) +
         rounded(n_kv_heads * static_cast<std::size_t>(stride) * sizeof(float)) + 256;
}

void defensive_scores(const CudaContext& context, const DeviceScoreLayer& given, ConstRows p,
                      ConstRows norms, std::int64_t first_norm, std::int64_t max_boosted,
                      std::byte* workspace, std::size_t workspace_bytes, Rows scores) {
  const Layer layer = score::layer_of(given);
  const std::int64_t stride = score_stride(given.n_slots);
  const std::int64_t n_rows = std::int64_t{layer.n_heads} * layer.n_queries;
  CHECK(layer.n_queries > 0 && p.n_rows == n_rows && p.stride >= stride && p.stride % 4 == 0 &&
            scores.n_rows == layer.n_kv_heads && scores.stride >= stride &&
            norms.n_rows == layer.n_kv_heads && norms.stride >= given.n_tokens - first_norm,
        "defensive_scores rows");
  CHECK(first_norm >= 0 && first_norm <= given.n_tokens &&
            workspace_bytes >= defensive_workspace_bytes(given.shape, stride),
        "defensive_scores workspace");
  const auto n_kv_heads = static_cast<std::size_t>(layer.n_kv_heads);
  Work work{};
  work.stride = stride;
  work.n_blocks = static_cast<std::int32_t>(column_blocks(stride));
  const auto take = [&](std::size_t n_bytes) {
    std::byte* piece = workspace;
    workspace += rounded(n_bytes);
    return piece;
  };
  work.floor_parts = reinterpret_cast<double*>(
      take(n_kv_heads * static_cast<std::size_t>(work.n_blocks) * sizeof(double)));
  const std::size_t row_bytes =
      static_cast<std::size_t>(layer.n_heads) * kMaxScoreQueries * sizeof(float);
  work.factor = reinterpret_cast<float*>(take(row_bytes));
  work.window_mass = reinterpret_cast<float*>(take(row_bytes));
  work.mean =
      reinterpret_cast<float*>(take(n_kv_heads * static_cast<std::size_t>(stride) * sizeof(float)));
  work.best_bits = reinterpret_cast<std::uint32_t*>(take(sizeof(std::uint32_t)));

  cudaStream_t stream = context.stream();
  const auto heads = static_cast<unsigned>(layer.n_kv_heads);
  row_masses<<<static_cast<unsigned>(n_rows), kRowThreads, 0, stream>>>(layer, p, work);
  check_launch("row_masses");
  pooled_maxima<<<dim3(static_cast<unsigned>(work.n_blocks), heads), kColumnBlockThreads, 0,
                  stream>>>(layer, p, work, scores);
  check_launch("pooled_maxima");
  apply_floor_and_norms<<<
      dim3(static_cast<unsigned>((stride + kFinishThreads - 1) / kFinishThreads), heads),
      kFinishThreads, 0, stream>>>(layer, work, norms, static_cast<int>(first_norm), scores);
  check_launch("apply_floor_and_norms");
  if (max_boosted <= 0) return;
  boost_heads<<<heads, rank::kThreads, 0, stream>>>(layer, work, max_boosted, scores);
  check_launch("boost_heads");
}

}  // namespace spindle::kernels
