// Decode attention over int4 blocks.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_int4_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kInt4>,
          device::launch_formats<DecodeFormats::kInt4>};
}

}  // namespace spindle::kernels
