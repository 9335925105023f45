#include "kernels/bench/cuda/random_fill.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/core/cuda_check.h"

namespace spindle::bench {
namespace {

__device__ std::uint64_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

__device__ float normal_at(std::uint64_t index, std::uint64_t seed) {
  const std::uint64_t bits = mix(index * 2 + 1 + mix(seed));
  const float u = (static_cast<float>(bits >> 40) + 1.0F) * 0x1p-24F;
  const float v = static_cast<float>(bits & 0xffffffU) * 0x1p-24F;
  return sqrtf(-2.0F * logf(u)) * cosf(6.2831853F * v);
}

template <typename T>
__global__ void fill_normal(T* out, std::size_t n, std::uint64_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    out[i] = static_cast<T>(normal_at(i, seed));
  }
}

__global__ void fill_bytes(std::uint64_t* out, std::size_t n, std::uint64_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    out[i] = mix(i + mix(seed));
  }
}

}  // namespace

void random_fill(const CudaContext& context, std::byte* data, std::size_t n_bytes, Bench::Fill fill,
                 std::uint64_t seed) {
  const int blocks = 4 * context.n_multiprocessors();
  cudaStream_t stream = context.stream();
  switch (fill) {
    case Bench::Fill::kNormalF16:
      fill_normal<<<blocks, 256, 0, stream>>>(reinterpret_cast<__half*>(data), n_bytes / 2, seed);
      break;
    case Bench::Fill::kNormalBf16:
      fill_normal<<<blocks, 256, 0, stream>>>(reinterpret_cast<__nv_bfloat16*>(data), n_bytes / 2,
                                              seed);
      break;
    case Bench::Fill::kNormalF32:
      fill_normal<<<blocks, 256, 0, stream>>>(reinterpret_cast<float*>(data), n_bytes / 4, seed);
      break;
    case Bench::Fill::kBytes:
      fill_bytes<<<blocks, 256, 0, stream>>>(reinterpret_cast<std::uint64_t*>(data),
                                             (n_bytes + 7) / 8, seed);
      break;
  }
  check_launch("random fill");
}

}  // namespace spindle::bench
