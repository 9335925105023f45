// Scores that are read from the window's probabilities column by column, and KeyDiff's, which are
// read from the keys.
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/kv_score_device.cuh"

namespace spindle::kernels {
namespace {

using score::kUnitTokens;
using score::Layer;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// KeyDiff: parts of a head's tail whose unit keys are summed apart.
constexpr int kKeyParts = 64;

unsigned blocks_for(std::int64_t n, std::int64_t per_block) {
  return static_cast<unsigned>((n + per_block - 1) / per_block);
}

void check_rows(const DeviceScoreLayer& given, ConstRows rows, std::int64_t n_rows) {
  CHECK(rows.n_rows == n_rows && rows.stride >= score_stride(given.n_slots) && rows.stride % 4 == 0,
        "rows of scores");
}

// Four columns a thread.
__global__ void __launch_bounds__(kThreads)
    mean_of_rows(const Layer layer, ConstRows p, Rows mean) {
  const int head = blockIdx.y;
  const int n = layer.n_slots[head / layer.group];
  const int column = 4 * (blockIdx.x * kThreads + threadIdx.x);
  if (column >= n) return;
  const float* from =
      p.data + static_cast<std::int64_t>(head) * layer.n_queries * p.stride + column;
  float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll 8
  for (int row = 0; row < layer.n_queries; ++row) {
    const float4 x = *reinterpret_cast<const float4*>(from + row * p.stride);
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  const auto divisor = static_cast<float>(layer.n_queries);
  float* target = mean.data + static_cast<std::int64_t>(head) * mean.stride + column;
  const float values[4] = {sum.x / divisor, sum.y / divisor, sum.z / divisor, sum.w / divisor};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < n) target[i] = values[i];
  }
}

// One block a query head. Rows are summed by warps.
__global__ void __launch_bounds__(kThreads)
    lazy_mass_of_heads(const Layer layer, ConstRows p, int n_sinks, int window, bool decode,
                       float* mass) {
  __shared__ double shared[kWarps];
  const int head = blockIdx.x;
  const int n = layer.n_slots[head / layer.group];
  const int w = layer.n_queries;
  const int sinks = min(n_sinks, n);
  double total = 0.0;
  for (int j = (decode ? w - 1 : 0) + static_cast<int>(threadIdx.x) / 32; j < w; j += kWarps) {
    const float* row = p.data + (static_cast<std::int64_t>(head) * w + j) * p.stride;
    // Decode counts the query itself.
    const int end = decode ? n : n - w + j;
    const int recent = max(end - min(window, end), sinks);
    for (int t = threadIdx.x % 32; t < sinks; t += 32) total += static_cast<double>(row[t]);
#pragma unroll 4
    for (int t = recent + static_cast<int>(threadIdx.x) % 32; t < end; t += 32) {
      total += static_cast<double>(row[t]);
    }
  }
  total = score::block_sum<kThreads>(total, shared);
  if (threadIdx.x == 0) mass[head] = static_cast<float>(decode ? total : total / w);
}

__global__ void __launch_bounds__(kThreads)
    pooled_means(const Layer layer, ConstRows means, bool take_mean, Rows scores) {
  const int kv_head = blockIdx.y;
  const int n = layer.n_slots[kv_head] - layer.n_queries;
  const int t = blockIdx.x * kThreads + threadIdx.x;
  if (t >= n) return;
  double sum = 0.0;
  double best = 0.0;
  for (int g = 0; g < layer.group; ++g) {
    const float* row =
        means.data + static_cast<std::int64_t>(kv_head * layer.group + g) * means.stride;
    double pooled = 0.0;
    for (int i = max(t - 2, 0); i < min(t + 3, n); ++i) pooled += static_cast<double>(row[i]);
    pooled /= 5.0;
    sum += pooled;
    best = pooled > best ? pooled : best;
  }
  scores.data[static_cast<std::int64_t>(kv_head) * scores.stride + t] =
      static_cast<float>(take_mean ? sum / layer.group : best);
}

template <bool kBf16>
__device__ float widen(std::uint16_t bits) {
  if constexpr (kBf16) {
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  } else {
    return __half2float(__ushort_as_half(bits));
  }
}

// 1 / ||key||, 0 for a zero key or one that is not finite.
__device__ inline float inverse_norm(float square) {
  return square > 0.0F && square < INFINITY ? 1.0F / sqrtf(square) : 0.0F;
}

// Lane c holds the channels 32 j + c of a token's key.
template <int kHeadDim, bool kBf16>
__device__ void load_key(const Layer& layer, const DeviceKvHead& head, int position,
                         float (&key)[kHeadDim / 32]) {
  const int at = position - head.tail_origin;
  const auto* page = reinterpret_cast<const std::uint16_t*>(
      layer.pool + head.pages[at / kUnitTokens] * layer.page_bytes);
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) {
    key[j] = widen<kBf16>(page[(j * kUnitTokens + at % kUnitTokens) * 32 + threadIdx.x % 32]);
  }
}

// Sums of the unit keys of a part of a head's tail, [kv heads][kKeyParts][head_dim].
template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kThreads) key_sums(const Layer layer, float* sums) {
  __shared__ float shared[kWarps][kHeadDim];
  const int kv_head = blockIdx.y;
  const DeviceKvHead& head = layer.head(kv_head);
  const int n = layer.n_tokens - head.tail_first;
  const int per_part = (n + kKeyParts - 1) / kKeyParts;
  const int begin = min(static_cast<int>(blockIdx.x) * per_part, n);
  const int end = min(begin + per_part, n);
  const int warp = threadIdx.x / 32;
  float sum[kHeadDim / 32] = {};
  for (int t = begin + warp; t < end; t += kWarps) {
    float key[kHeadDim / 32];
    load_key<kHeadDim, kBf16>(layer, head, head.tail_first + t, key);
    float square = 0.0F;
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) square += key[j] * key[j];
    const float factor = inverse_norm(score::warp_sum(square));
    if (factor == 0.0F) continue;
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) sum[j] += key[j] * factor;
  }
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) shared[warp][32 * j + threadIdx.x % 32] = sum[j];
  __syncthreads();
  for (int c = threadIdx.x; c < kHeadDim; c += kThreads) {
    float total = 0.0F;
    for (int i = 0; i < kWarps; ++i) total += shared[i][c];
    sums[(static_cast<std::int64_t>(kv_head) * kKeyParts + blockIdx.x) * kHeadDim + c] = total;
  }
}

// A warp a token.
template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kThreads)
    key_scores(const Layer layer, const float* sums, Rows scores) {
  __shared__ float direction[kHeadDim];
  __shared__ double shared[kWarps];
  const int kv_head = blockIdx.y;
  const DeviceKvHead& head = layer.head(kv_head);
  const int n = layer.n_tokens - head.tail_first;
  double total = 0.0;
  if (threadIdx.x < kHeadDim) {
    for (int part = 0; part < kKeyParts; ++part) {
      total += static_cast<double>(
          sums[(static_cast<std::int64_t>(kv_head) * kKeyParts + part) * kHeadDim + threadIdx.x]);
    }
  }
  const double square = score::block_sum<kThreads>(total * total, shared);
  if (threadIdx.x < kHeadDim) {
    direction[threadIdx.x] = square > 0.0 ? static_cast<float>(total / sqrt(square)) : 0.0F;
  }
  __syncthreads();
  float along_direction[kHeadDim / 32];
#pragma unroll
  for (int j = 0; j < kHeadDim / 32; ++j) along_direction[j] = direction[32 * j + threadIdx.x % 32];
  for (int t = blockIdx.x * kWarps + threadIdx.x / 32; t < n; t += gridDim.x * kWarps) {
    float key[kHeadDim / 32];
    load_key<kHeadDim, kBf16>(layer, head, head.tail_first + t, key);
    float norm = 0.0F;
    float along = 0.0F;
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
      norm += key[j] * key[j];
      along += key[j] * along_direction[j];
    }
    norm = score::warp_sum(norm);
    along = score::warp_sum(along);
    if (threadIdx.x % 32 == 0) {
      scores.data[static_cast<std::int64_t>(kv_head) * scores.stride + t] =
          -along * inverse_norm(norm);
    }
  }
}

template <int kHeadDim, bool kBf16>
void launch_keydiff(const CudaContext& context, const Layer& layer, std::int64_t most_keys,
                    float* sums, Rows scores) {
  const auto n_heads = static_cast<unsigned>(layer.n_kv_heads);
  cudaStream_t stream = context.stream();
  key_sums<kHeadDim, kBf16><<<dim3(kKeyParts, n_heads), kThreads, 0, stream>>>(layer, sums);
  check_launch("key_sums");
  // Eight keys a warp: enough to pay for the direction.
  key_scores<kHeadDim, kBf16>
      <<<dim3(blocks_for(most_keys, 8 * kWarps), n_heads), kThreads, 0, stream>>>(layer, sums,
                                                                                  scores);
  check_launch("key_scores");
}

}  // namespace

void window_mean(const CudaContext& context, const DeviceScoreLayer& given, ConstRows p,
                 Rows mean) {
  const Layer layer = score::layer_of(given);
  CHECK(layer.n_queries > 0, "window_mean of no rows");
  check_rows(given, p, std::int64_t{layer.n_heads} * layer.n_queries);
  check_rows(given, mean, layer.n_heads);
  const dim3 grid(blocks_for(score::largest(given.n_slots), 4 * kThreads),
                  static_cast<unsigned>(layer.n_heads));
  mean_of_rows<<<grid, kThreads, 0, context.stream()>>>(layer, p, mean);
  check_launch("mean_of_rows");
}

void lazy_mass(const CudaContext& context, const DeviceScoreLayer& given, ConstRows p, int n_sinks,
               std::int64_t window, bool decode, float* mass) {
  const Layer layer = score::layer_of(given);
  CHECK(layer.n_queries > 0 && n_sinks >= 0 && window >= 0, "lazy_mass arguments");
  check_rows(given, p, std::int64_t{layer.n_heads} * layer.n_queries);
  const int limit = static_cast<int>(window < given.n_tokens ? window : given.n_tokens);
  lazy_mass_of_heads<<<static_cast<unsigned>(layer.n_heads), kThreads, 0, context.stream()>>>(
      layer, p, n_sinks, limit, decode, mass);
  check_launch("lazy_mass_of_heads");
}

void snapkv_scores(const CudaContext& context, const DeviceScoreLayer& given, ConstRows means,
                   GroupReduce reduce, Rows scores) {
  const Layer layer = score::layer_of(given);
  check_rows(given, means, layer.n_heads);
  check_rows(given, scores, layer.n_kv_heads);
  const dim3 grid(blocks_for(score::largest(given.n_slots), kThreads),
                  static_cast<unsigned>(layer.n_kv_heads));
  pooled_means<<<grid, kThreads, 0, context.stream()>>>(layer, means, reduce == GroupReduce::kMean,
                                                        scores);
  check_launch("pooled_means");
}

std::size_t keydiff_workspace_bytes(const AttentionShape& shape) {
  return static_cast<std::size_t>(shape.n_kv_heads) * kKeyParts *
         static_cast<std::size_t>(shape.head_dim) * sizeof(float);
}

void keydiff_scores(const CudaContext& context, const DeviceScoreLayer& given, std::byte* workspace,
                    std::size_t workspace_bytes, Rows scores) {
  const Layer layer = score::layer_of(given);
  CHECK(workspace_bytes >= keydiff_workspace_bytes(given.shape), "keydiff workspace");
  check_rows(given, scores, layer.n_kv_heads);
  std::int64_t most = 1;
  for (const std::int64_t first : given.tail_first) {
    most = given.n_tokens - first > most ? given.n_tokens - first : most;
  }
  auto* sums = reinterpret_cast<float*>(workspace);
  const bool bf16 = given.pool.layout.dtype == DType::kBF16;
  if (given.shape.head_dim == 128) {
    bf16 ? launch_keydiff<128, true>(context, layer, most, sums, scores)
         : launch_keydiff<128, false>(context, layer, most, sums, scores);
  } else {
    bf16 ? launch_keydiff<64, true>(context, layer, most, sums, scores)
         : launch_keydiff<64, false>(context, layer, most, sums, scores);
  }
}

}  // namespace spindle::kernels
