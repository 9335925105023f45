// Decode attention over KIVI blocks.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_kivi_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kKivi>,
          device::launch_formats<DecodeFormats::kKivi>};
}

}  // namespace spindle::kernels
