#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/convert.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"

namespace spindle::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void to_f16(const float* x, std::int64_t x_stride, __half* out, std::int64_t out_stride,
                       std::int64_t n, std::int64_t width) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t row = i / width;
    const std::int64_t column = i % width;
    out[row * out_stride + column] = __float2half_rn(x[row * x_stride + column]);
  }
}

}  // namespace

void convert(const CudaContext& context, ConstRows x, F16Rows out) {
  CHECK(x.n_rows == out.n_rows && x.width == out.width, "convert shapes");
  const std::int64_t n = x.n_rows * x.width;
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(
      n < std::int64_t{kThreads} * 4096 ? (n + kThreads - 1) / kThreads : 4096);
  to_f16<<<blocks, kThreads, 0, context.stream()>>>(
      x.data, x.stride, reinterpret_cast<__half*>(out.data), out.stride, n, x.width);
  check_launch("convert");
}

}  // namespace spindle::kernels
