// Decode attention over blocks of Lloyd-Max levels with the levels of code pairs in shared memory,
// of which a CTA takes all that a multiprocessor of Hopper has.

#include "kernels/cuda/decode_kernel.cuh"

namespace spindle::kernels {

DecodeKernels decode_lloyd_table_kernels() {
  return {device::teams_per_multiprocessor<DecodeFormats::kLloyd, true>,
          device::launch_formats<DecodeFormats::kLloyd, true>};
}

}  // namespace spindle::kernels
