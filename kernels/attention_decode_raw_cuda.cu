// Decode attention over pages and raw blocks.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_raw_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kRaw>,
          device::launch_formats<DecodeFormats::kRaw>};
}

}  // namespace spindle::kernels
