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
    EXPECT_EQ(device.unique_id.size(), 16u);
    // The same at every call: 10 GB/s to 100 TB/s, or not known.
    EXPECT_EQ(
        device.memory_bytes_per_second,
        (*list_cuda_devices())[static_cast<std::size_t>(device.index)].memory_bytes_per_second);
    if (device.memory_bytes_per_second != 0) {
      EXPECT_GT(device.memory_bytes_per_second, 10'000'000'000u);
      EXPECT_LT(device.memory_bytes_per_second, 100'000'000'000'000u);
    }
  }
}

}  // namespace
}  // namespace spindle::kernels
