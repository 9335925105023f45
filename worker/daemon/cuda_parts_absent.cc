#include "worker/daemon/compute_parts.h"

namespace spindle::worker {

Result<ComputeParts> make_cuda_parts(const ComputeOptions&, comm::HostGroup&, comm::DeviceGroup&) {
  return unimplemented("compute.device is CUDA: this build of Spindle has no CUDA");
}

}  // namespace spindle::worker
