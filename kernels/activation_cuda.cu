#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/activation.h"
#include "kernels/core/check.h"
#include "kernels/cuda/chained_launch.cuh"

namespace spindle::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // values of 16 bytes

struct Arguments {
  const float* gate_up;
  __nv_bfloat16* out;
  std::int64_t in_stride;
  std::int64_t out_stride;
  std::int64_t inter;
  std::int64_t n_rows;
};

__device__ float gated(float gate, float up) { return gate / (1.0F + __expf(-gate)) * up; }

// Values of a row by x, rows by y.
__global__ __launch_bounds__(kThreads) void swiglu_vectors(const Arguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector;
  if (at >= a.inter) return;
  for (std::int64_t row = blockIdx.y; row < a.n_rows; row += gridDim.y) {
    const float* in = a.gate_up + row * a.in_stride + at;
    const float4 gate = *reinterpret_cast<const float4*>(in);
    const float4 up = *reinterpret_cast<const float4*>(in + a.inter);
    union {
      __nv_bfloat162 pairs[2];
      uint2 bits;
    } out;
    out.pairs[0] = __floats2bfloat162_rn(gated(gate.x, up.x), gated(gate.y, up.y));
    out.pairs[1] = __floats2bfloat162_rn(gated(gate.z, up.z), gated(gate.w, up.w));
    *reinterpret_cast<uint2*>(a.out + row * a.out_stride + at) = out.bits;
  }
}

__global__ __launch_bounds__(kThreads) void swiglu_any(const Arguments a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= a.inter) return;
  for (std::int64_t row = blockIdx.y; row < a.n_rows; row += gridDim.y) {
    const float* in = a.gate_up + row * a.in_stride + at;
    a.out[row * a.out_stride + at] = __float2bfloat16_rn(gated(in[0], in[a.inter]));
  }
}

bool aligned(const void* data, std::size_t n_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % n_bytes == 0;
}

}  // namespace

void swiglu(const CudaContext& context, ConstRows gate_up, Bf16Rows out) {
  CHECK(gate_up.n_rows == out.n_rows && gate_up.width == 2 * out.width, "swiglu shapes");
  if (out.n_rows == 0 || out.width == 0) return;
  const Arguments a = {gate_up.data,   reinterpret_cast<__nv_bfloat16*>(out.data),
                       gate_up.stride, out.stride,
                       out.width,      out.n_rows};
  const bool vectors = out.width % kVector == 0 && gate_up.stride % kVector == 0 &&
                       out.stride % kVector == 0 && aligned(gate_up.data, 16) &&
                       aligned(out.data, 8);
  const std::int64_t per_block = kThreads * (vectors ? kVector : 1);
  const dim3 grid(static_cast<unsigned>((out.width + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min<std::int64_t>(out.n_rows, 65535)));
  launch_chained(context, "swiglu", vectors ? swiglu_vectors : swiglu_any, grid, dim3(kThreads), 0,
                 a);
}

}  // namespace spindle::kernels
