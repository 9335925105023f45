// Decode attention over blocks of token ids and codebook entries.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_rows_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kRows>,
          device::launch_formats<DecodeFormats::kRows>};
}

}  // namespace spindle::kernels
