#include "kernels/bench/cuda/bench.h"
#include "worker/bench/device_rates.h"

namespace spindle::worker {

std::optional<DeviceRates> measure_device_rates(int device) {
  const bench::Bench bench(device);
  return DeviceRates{bench.copy_bytes_per_second(), bench.gemm_flops_per_second()};
}

}  // namespace spindle::worker
