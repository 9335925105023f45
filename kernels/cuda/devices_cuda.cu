#include <cuda_runtime.h>

#include <string>

#include "kernels/cuda/devices.h"

namespace spindle::kernels {
namespace {

Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return ok_status();
  return unavailable(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

Result<std::vector<CudaDevice>> list_cuda_devices() {
  int n_devices = 0;
  const cudaError_t counted = cudaGetDeviceCount(&n_devices);
  // A machine without a GPU or without its driver is an ordinary CPU machine.
  if (counted == cudaErrorNoDevice || counted == cudaErrorInsufficientDriver) {
    return std::vector<CudaDevice>();
  }
  if (Status status = cuda_status(counted, "cudaGetDeviceCount"); !status.ok()) return status;
  std::vector<CudaDevice> devices;
  for (int i = 0; i < n_devices; ++i) {
    cudaDeviceProp properties{};
    const Status status =
        cuda_status(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    if (!status.ok()) return status;
    CudaDevice device;
    device.index = i;
    device.name = properties.name;
    device.compute_capability = properties.major * 10 + properties.minor;
    device.n_multiprocessors = properties.multiProcessorCount;
    device.total_bytes = properties.totalGlobalMem;
    devices.push_back(device);
  }
  return devices;
}

}  // namespace spindle::kernels
