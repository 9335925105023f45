#pragma once
// Programmatic dependent launch: the next kernel of the stream starts while this one still runs,
// and waits inside for its end. It hides launches and lets a product fetch its weights meanwhile.
//
// Rules for a kernel launched by launch_chained():
// - every thread that touches memory which an earlier kernel may write, or writes memory which an
//   earlier kernel may read, calls wait_for_previous_kernel() before. Weights need no wait.
// - every block calls wait_for_previous_kernel() on every path: the wait is what orders the kernel
//   after all that came before it, also for the kernels behind.
// - let_next_kernel_start() is only a hint and may come before the wait.
// Before compute capability 9.0 the launch is an ordinary one and both calls do nothing.

#include <cuda_runtime.h>

#include <string_view>

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"

namespace spindle::kernels {

__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename... Params, typename... Args>
void launch_chained(const CudaContext& context, std::string_view name, void (*kernel)(Params...),
                    dim3 grid, dim3 block, std::size_t shared_bytes, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream();
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = context.compute_capability() >= 90 ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

}  // namespace spindle::kernels
