// One block per row. The row stays in registers between the sum and the scaling; rows too long for
// that are read twice.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/norm.h"

namespace spindle::kernels {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kCached = 4;  // vectors of four values per thread kept in registers

struct Arguments {
  const float* x;
  const float* weight;
  __nv_bfloat16* out;
  std::int64_t x_stride;
  std::int64_t out_stride;
  std::int64_t width;
  float eps;
};

__device__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

// The same in all threads.
__device__ float block_sum(float value) {
  __shared__ float warp_sums[32];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  return warp_sum(lane < blockDim.x / 32 ? warp_sums[lane] : 0.0F);
}

__device__ float row_scale(float sum, const Arguments& a) {
  return 1.0F / sqrtf(block_sum(sum) / static_cast<float>(a.width) + a.eps);
}

__device__ void store4(__nv_bfloat16* out, float4 x, float4 weight, float scale) {
  union {
    __nv_bfloat162 pairs[2];
    uint2 bits;
  } packed;
  packed.pairs[0] = __floats2bfloat162_rn(weight.x * (x.x * scale), weight.y * (x.y * scale));
  packed.pairs[1] = __floats2bfloat162_rn(weight.z * (x.z * scale), weight.w * (x.w * scale));
  *reinterpret_cast<uint2*>(out) = packed.bits;
}

__device__ float sum_of_squares(float4 v, float sum) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}

// Rows of at most 4 * kCached * blockDim.x values, in whole aligned vectors.
__global__ __launch_bounds__(kMaxThreads) void norm_cached(const Arguments a) {
  let_next_kernel_start();
  const auto n_vectors = static_cast<int>(a.width / 4);
  float4 weight[kCached];
#pragma unroll
  for (int i = 0; i < kCached; ++i) {
    const int at = static_cast<int>(threadIdx.x + i * blockDim.x);
    weight[i] = at < n_vectors ? reinterpret_cast<const float4*>(a.weight)[at]
                               : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  }
  wait_for_previous_kernel();
  const auto* x = reinterpret_cast<const float4*>(a.x + blockIdx.x * a.x_stride);
  float4 values[kCached];
#pragma unroll
  for (int i = 0; i < kCached; ++i) {
    const int at = static_cast<int>(threadIdx.x + i * blockDim.x);
    values[i] = at < n_vectors ? x[at] : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  }
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kCached; ++i) sum = sum_of_squares(values[i], sum);
  const float scale = row_scale(sum, a);
  __nv_bfloat16* out = a.out + blockIdx.x * a.out_stride;
#pragma unroll
  for (int i = 0; i < kCached; ++i) {
    const int at = static_cast<int>(threadIdx.x + i * blockDim.x);
    if (at < n_vectors) store4(out + 4 * at, values[i], weight[i], scale);
  }
}

__global__ __launch_bounds__(kMaxThreads) void norm_any(const Arguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const float* x = a.x + blockIdx.x * a.x_stride;
  float sum = 0.0F;
  for (std::int64_t i = threadIdx.x; i < a.width; i += blockDim.x) sum = fmaf(x[i], x[i], sum);
  const float scale = row_scale(sum, a);
  __nv_bfloat16* out = a.out + blockIdx.x * a.out_stride;
  for (std::int64_t i = threadIdx.x; i < a.width; i += blockDim.x) {
    out[i] = __float2bfloat16_rn(a.weight[i] * (x[i] * scale));
  }
}

bool aligned(const void* data, std::size_t n_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % n_bytes == 0;
}

// Whole warps for `n` values, by the width of a row alone: so is the order of the sum.
unsigned threads_for(std::int64_t n) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((n + 31) / 32 * 32, 32, kMaxThreads));
}

}  // namespace

void rms_norm(const CudaContext& context, ConstRows x, const float* weight, float eps,
              Bf16Rows out) {
  CHECK(x.n_rows == out.n_rows && x.width == out.width, "row shapes differ");
  if (x.n_rows == 0 || x.width == 0) return;
  CHECK(x.n_rows <= 0x7fffffff, "rows of a norm");
  const Arguments a = {x.data,   weight,     reinterpret_cast<__nv_bfloat16*>(out.data),
                       x.stride, out.stride, x.width,
                       eps};
  const bool vectors = x.width % 4 == 0 && x.stride % 4 == 0 && out.stride % 4 == 0 &&
                       aligned(x.data, 16) && aligned(weight, 16) && aligned(out.data, 8) &&
                       x.width <= 4 * kCached * kMaxThreads;
  const dim3 grid(static_cast<unsigned>(x.n_rows));
  if (vectors) {
    // Small blocks, so that one fits beside the products that start early.
    launch_chained(context, "rms norm", norm_cached, grid,
                   dim3(threads_for((x.width / 4 + kCached - 1) / kCached)), 0, a);
  } else {
    launch_chained(context, "rms norm", norm_any, grid, dim3(threads_for(x.width / 4)), 0, a);
  }
}

}  // namespace spindle::kernels
