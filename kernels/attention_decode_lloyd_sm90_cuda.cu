// Decode attention over blocks of Lloyd-Max levels for compute capability 9.0: fed by the copy
// engine, with the levels of code pairs in shared memory.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_lloyd_sm90_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kLloyd, true>,
          device::launch_formats<DecodeFormats::kLloyd, true>};
}

}  // namespace spindle::kernels
