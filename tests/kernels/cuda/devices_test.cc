#include "kernels/cuda/devices.h"

#include <gtest/gtest.h>

#include <filesystem>

namespace spindle::kernels {
namespace {

TEST(CudaDevices, AHostWithoutADriverHasNone) {
  const auto devices = list_cuda_devices();
  ASSERT_TRUE(devices.ok()) << devices.status().to_string();
  if (!std::filesystem::exists("/dev/nvidiactl")) {
    EXPECT_TRUE(devices->empty());
  }
}

TEST(CudaDevices, EveryDeviceIsDescribed) {
  const auto devices = list_cuda_devices();
  ASSERT_TRUE(devices.ok()) << devices.status().to_string();
  int index = 0;
  for (const CudaDevice& device : *devices) {
    EXPECT_EQ(device.index, index++);
    EXPECT_FALSE(device.name.empty());
    EXPECT_GE(device.compute_capability, 50);
    EXPECT_GT(device.n_multiprocessors, 0);
    EXPECT_GT(device.total_bytes, 1u << 30);
  }
}

}  // namespace
}  // namespace spindle::kernels
