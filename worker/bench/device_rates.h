#pragma once
// The yardsticks of a GPU for pipeline_bench: copy bandwidth and the rate of a large bf16 product.

#include <optional>

namespace spindle::worker {

struct DeviceRates {
  double copy_bytes_per_second = 0;  // read plus written
  double gemm_flops_per_second = 0;
};

// Measured on the device, which must have a few GiB free; empty in builds without CUDA.
std::optional<DeviceRates> measure_device_rates(int device);

}  // namespace spindle::worker
