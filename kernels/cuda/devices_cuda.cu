#include <cuda_runtime.h>

#include <string>

#include "kernels/cuda/devices.h"

namespace spindle::kernels {
namespace {

Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return ok_status();
  return unavailable(std::string(what) + ": " + cudaGetErrorString(error));
}

// Two transfers a clock. A device that does not say (a share of a GPU, say) is not an error.
std::uint64_t memory_bytes_per_second(int device) {
  int clock_khz = 0;
  int bus_bits = 0;
  if (cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  if (clock_khz <= 0 || bus_bits <= 0) return 0;
  return 2ULL * 1000 * static_cast<std::uint64_t>(clock_khz) *
         static_cast<std::uint64_t>(bus_bits) / 8;
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
    device.unique_id.assign(properties.uuid.bytes, sizeof(properties.uuid.bytes));
    device.memory_bytes_per_second = memory_bytes_per_second(i);
    devices.push_back(device);
  }
  return devices;
}

}  // namespace spindle::kernels
