#include "kernels/cuda/devices.h"

namespace spindle::kernels {

Result<std::vector<CudaDevice>> list_cuda_devices() { return std::vector<CudaDevice>(); }

}  // namespace spindle::kernels
