#include "worker/bench/device_rates.h"

namespace spindle::worker {

std::optional<DeviceRates> measure_device_rates(int /*device*/) { return std::nullopt; }

}  // namespace spindle::worker
