#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/kv_compact.h"

namespace spindle::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  // 16-byte loads of a thread before its first store
constexpr int kMaxShares = 64;

// Share blockIdx.y of copy blockIdx.x.
__global__ void __launch_bounds__(kThreads) copy_kernel(const DeviceCopy* copies) {
  const DeviceCopy copy = copies[blockIdx.x];
  const auto* source = reinterpret_cast<const uint4*>(copy.source);
  auto* target = reinterpret_cast<uint4*>(copy.target);
  const std::uint64_t n = copy.n_bytes / sizeof(uint4);
  constexpr std::uint64_t kStep = std::uint64_t{kThreads} * kInFlight;
  for (std::uint64_t first = blockIdx.y * kStep; first < n; first += gridDim.y * kStep) {
    uint4 values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::uint64_t at = first + static_cast<std::uint64_t>(i) * kThreads + threadIdx.x;
      values[i] = source != nullptr && at < n ? source[at] : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::uint64_t at = first + static_cast<std::uint64_t>(i) * kThreads + threadIdx.x;
      if (at < n) target[at] = values[i];
    }
  }
}

}  // namespace

void kv_copy(const CudaContext& context, const DeviceCopy* copies, int n_copies) {
  CHECK(n_copies >= 0, "kv_copy count");
  if (n_copies == 0) return;
  // Sizes are known to the device only: a few copies are cut into shares that fill it.
  const int shares = std::clamp(16 * context.n_multiprocessors() / n_copies, 1, kMaxShares);
  const dim3 grid(static_cast<unsigned>(n_copies), static_cast<unsigned>(shares));
  copy_kernel<<<grid, kThreads, 0, context.stream()>>>(copies);
  check_launch("kv_copy");
}

}  // namespace spindle::kernels
