// Decode attention over blocks of Lloyd-Max levels.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_lloyd_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kLloyd>,
          device::launch_formats<DecodeFormats::kLloyd>};
}

}  // namespace spindle::kernels
