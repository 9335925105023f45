// Decode attention over blocks of every format.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_all_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kAll>,
          device::launch_formats<DecodeFormats::kAll>};
}

}  // namespace spindle::kernels
