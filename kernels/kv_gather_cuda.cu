#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/kv_codec.cuh"
#include "kernels/kv_quant.h"

namespace spindle::kernels {
namespace {

using codec::Eight;

// ---- kv_gather

constexpr int kGatherThreads = 256;
constexpr int kGatherTokens = 32;

template <int kDim, bool kIsBf16>
__device__ Eight gathered_eight(const std::uint16_t* from) {
  Eight eight = codec::load_eight(from);
  if constexpr (kIsBf16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      eight.at[i] = codec::saturated_f16(codec::widened<true>(eight.at[i]));
    }
  }
  return eight;
}

struct GatherRope {
  const float* cos;
  const float* sin;
  int half;
  float norm;  // 1 / attention_scale^2
};

// Undoes RoPE of the channels [low, low + 8) and the eight they were rotated with.
template <bool kIsBf16>
__device__ void unrotate(const GatherRope& rope, int position, int low, const Eight& a_bits,
                         const Eight& b_bits, Eight* a_out, Eight* b_out) {
  const std::int64_t at = static_cast<std::int64_t>(position) * rope.half + low;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = codec::widened<kIsBf16>(a_bits.at[i]);
    const float b = codec::widened<kIsBf16>(b_bits.at[i]);
    const float cos = rope.cos[at + i];
    const float sin = rope.sin[at + i];
    a_out->at[i] =
        codec::saturated_f16(__fmul_rn(__fadd_rn(__fmul_rn(a, cos), __fmul_rn(b, sin)), rope.norm));
    b_out->at[i] =
        codec::saturated_f16(__fmul_rn(__fsub_rn(__fmul_rn(b, cos), __fmul_rn(a, sin)), rope.norm));
  }
}

// Keys of one token: a thread takes eight channels and the eight they are rotated with, or any
// sixteen of those beyond rotary_dim.
template <int kDim, bool kIsBf16>
__device__ void gather_keys(const GatherRope& rope, const DeviceGather& gather, std::int64_t row,
                            int part, const std::uint16_t* page, int slot, int position) {
  const bool rotated = gather.k_pre != nullptr && part * 8 < rope.half;
  const int half = gather.k_pre != nullptr ? rope.half : 0;
  const int low = rotated ? part * 8 : 2 * half + (part - half / 8) * 16;
  const int high = rotated ? low + half : low + 8;
  const auto at = [&](int channel) {
    return page + (channel / 32 * kKvPageTokens + slot) * 32 + channel % 32;
  };
  if (gather.k != nullptr) {
    std::uint16_t* out = reinterpret_cast<std::uint16_t*>(gather.k) + row * kDim;
    codec::store_eight(out + low, gathered_eight<kDim, kIsBf16>(at(low)));
    codec::store_eight(out + high, gathered_eight<kDim, kIsBf16>(at(high)));
  }
  if (gather.k_pre == nullptr) return;
  std::uint16_t* out = reinterpret_cast<std::uint16_t*>(gather.k_pre) + row * kDim;
  if (rotated) {
    Eight a;
    Eight b;
    unrotate<kIsBf16>(rope, position, low, codec::load_eight(at(low)), codec::load_eight(at(high)),
                      &a, &b);
    codec::store_eight(out + low, a);
    codec::store_eight(out + high, b);
  } else {
    codec::store_eight(out + low, gathered_eight<kDim, kIsBf16>(at(low)));
    codec::store_eight(out + high, gathered_eight<kDim, kIsBf16>(at(high)));
  }
}

// Block: 32 tokens of one gather, tile blockIdx.x of gather blockIdx.y.
template <int kDim, bool kIsBf16>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const std::byte* pool, const GatherRope rope, const DeviceGather* gathers) {
  constexpr int kPageBytes = 4 * kDim * kKvPageTokens;
  const DeviceGather gather = gathers[blockIdx.y];
  const int first = static_cast<int>(blockIdx.x) * kGatherTokens;
  if (first >= gather.n_tokens) return;
  __shared__ const std::uint16_t* pages[kGatherTokens];
  __shared__ int slots[kGatherTokens];
  __shared__ int positions[kGatherTokens];
  const int thread = static_cast<int>(threadIdx.x);
  const int n = min(kGatherTokens, gather.n_tokens - first);
  if (thread < n) {
    const int position = gather.positions == nullptr ? gather.first_position + first + thread
                                                     : gather.positions[first + thread];
    const int offset = position - gather.tail_origin;
    const std::int64_t page = gather.pages[offset / kKvPageTokens];
    pages[thread] = reinterpret_cast<const std::uint16_t*>(pool + page * kPageBytes);
    slots[thread] = offset % kKvPageTokens;
    positions[thread] = position;
  }
  __syncthreads();

  if (gather.k != nullptr || gather.k_pre != nullptr) {
    constexpr int kParts = kDim / 16;
    for (int item = thread; item < n * kParts; item += kGatherThreads) {
      const int token = item / kParts;
      gather_keys<kDim, kIsBf16>(rope, gather, first + token, item % kParts, pages[token],
                                 slots[token], positions[token]);
    }
  }
  if (gather.v == nullptr) return;
  // A lane is a token: neighbours read one run of a channel, and write 32 bytes of a row each.
  const int token = thread % 32;
  if (token >= n) return;
  for (int channel = thread / 32 * 16; channel < kDim; channel += kGatherThreads / 32 * 16) {
    const std::uint16_t* in =
        pages[token] + kDim * kKvPageTokens + channel * kKvPageTokens + slots[token];
    Eight eights[2];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const std::uint16_t bits = in[i * kKvPageTokens];
      eights[i / 8].at[i % 8] = kIsBf16 ? codec::saturated_f16(codec::widened<true>(bits)) : bits;
    }
    std::uint16_t* out =
        reinterpret_cast<std::uint16_t*>(gather.v) + std::int64_t{first + token} * kDim + channel;
    codec::store_eight(out, eights[0]);
    codec::store_eight(out + 8, eights[1]);
  }
}

// ---- kv_mean

constexpr int kMeanRows = 128;    // of one stage, an even number
constexpr int kMeanColumns = 32;  // of one block
constexpr int kMeanStages = 6;

// One thread per column: pairs of rows are added first and the pairs in ascending order, which is
// one chain, so its rows come ahead through shared memory. Columns [32 y, 32 y + 32) of mean x.
template <int kDim>
__global__ void __launch_bounds__(kMeanColumns) mean_kernel(const DeviceMean* means) {
  __shared__ __align__(16) std::uint16_t staged[kMeanStages][kMeanRows][kMeanColumns];
  const DeviceMean job = means[blockIdx.x];
  const int column = static_cast<int>(threadIdx.x);
  const int first_column = static_cast<int>(blockIdx.y) * kMeanColumns;
  const auto* rows = reinterpret_cast<const std::uint16_t*>(job.rows) + first_column;
  const int n_chunks = (job.n + kMeanRows - 1) / kMeanRows;
  const auto fetch = [&](int chunk) {
    constexpr int kRowsAtOnce = kMeanColumns / 4;  // four threads a row
    const int first = chunk * kMeanRows;
#pragma unroll 8
    for (int t = column / 4; t < kMeanRows; t += kRowsAtOnce) {
      if (first + t >= job.n) break;
      __pipeline_memcpy_async(&staged[chunk % kMeanStages][t][column % 4 * 8],
                              rows + std::int64_t{first + t} * kDim + column % 4 * 8, 16);
    }
  };
  for (int chunk = 0; chunk < kMeanStages - 1; ++chunk) {
    if (chunk < n_chunks) fetch(chunk);
    __pipeline_commit();
  }
  float sum = 0.0F;
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    __pipeline_wait_prior(kMeanStages - 2);
    __syncthreads();
    if (chunk + kMeanStages - 1 < n_chunks) fetch(chunk + kMeanStages - 1);
    __pipeline_commit();
    const auto at = [&](int t) { return codec::f16_value(staged[chunk % kMeanStages][t][column]); };
    const int n = min(kMeanRows, job.n - chunk * kMeanRows);
    if (n == kMeanRows) {
#pragma unroll
      for (int t = 0; t < kMeanRows; t += 2) sum = __fadd_rn(sum, __fadd_rn(at(t), at(t + 1)));
      continue;
    }
    int t = 0;
    for (; t + 1 < n; t += 2) sum = __fadd_rn(sum, __fadd_rn(at(t), at(t + 1)));
    if (t < n) sum = __fadd_rn(sum, at(t));
  }
  job.mean[first_column + column] =
      codec::saturated_f16(__fdiv_rn(sum, static_cast<float>(max(job.n, 1))));
}

void check_head_dim(int head_dim) { CHECK(head_dim == 64 || head_dim == 128, "head_dim"); }

}  // namespace

void kv_gather(const CudaContext& context, const std::byte* pool, DType dtype, int head_dim,
               const DeviceRope& rope, const DeviceGather* gathers, int n_gathers,
               std::int32_t max_tokens) {
  check_head_dim(head_dim);
  CHECK(dtype != DType::kF32, "pages of 16-bit elements");
  CHECK(rope.rotary_dim <= head_dim && rope.rotary_dim % 16 == 0, "rotary_dim is a multiple of 16");
  CHECK(n_gathers >= 0 && n_gathers < 65536 && max_tokens >= 0, "kv_gather counts");
  if (n_gathers == 0 || max_tokens == 0) return;
  const GatherRope rotation{rope.cos, rope.sin, rope.rotary_dim / 2,
                            1.0F / (rope.attention_scale * rope.attention_scale)};
  const dim3 grid(static_cast<unsigned>((max_tokens - 1) / kGatherTokens + 1),
                  static_cast<unsigned>(n_gathers));
  const auto launch = [&](auto kernel) {
    kernel<<<grid, kGatherThreads, 0, context.stream()>>>(pool, rotation, gathers);
  };
  const bool is_bf16 = dtype == DType::kBF16;
  if (head_dim == 64) {
    is_bf16 ? launch(gather_kernel<64, true>) : launch(gather_kernel<64, false>);
  } else {
    is_bf16 ? launch(gather_kernel<128, true>) : launch(gather_kernel<128, false>);
  }
  check_launch("kv_gather");
}

void kv_mean(const CudaContext& context, int head_dim, const DeviceMean* means, int n_means) {
  check_head_dim(head_dim);
  CHECK(n_means >= 0, "kv_mean count");
  if (n_means == 0) return;
  const dim3 grid(static_cast<unsigned>(n_means), static_cast<unsigned>(head_dim / kMeanColumns));
  const auto launch = [&](auto kernel) {
    kernel<<<grid, kMeanColumns, 0, context.stream()>>>(means);
  };
  if (head_dim == 64) {
    launch(mean_kernel<64>);
  } else {
    launch(mean_kernel<128>);
  }
  check_launch("kv_mean");
}

}  // namespace spindle::kernels
