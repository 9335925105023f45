#include "kvstore/device_staging.h"

#include <cstdint>
#include <string>
#include <vector>

#include "tests/gpu/gpu_fixture.h"

namespace spindle::kvstore {
namespace {

class DeviceStagingCudaTest : public testing::GpuTest {
 protected:
  struct Staged32 {
    const std::uint32_t* values;
    std::size_t n;
    std::size_t at;  // in the log
  };
};

// The device is kept busy, so that the host comes to every part of its ring while older copies from
// it have not run; what arrived is copied away before the next round may overwrite it.
TEST_F(DeviceStagingCudaTest, ValuesArriveHoweverFarTheHostIsAhead) {
  constexpr std::size_t kBytes = 4096;
  constexpr int kRounds = 300;
  auto staging = DeviceStaging::create(gpu(), kBytes, "a test's staging");
  ASSERT_TRUE(staging.ok()) << staging.status().to_string();
  const auto busy = device<std::uint8_t>(std::size_t{128} << 20);
  const auto log = device<std::uint32_t>(kRounds * kBytes / sizeof(std::uint32_t));
  std::vector<std::uint32_t> expected;
  std::vector<Staged32> unsent;
  for (int round = 0; round < kRounds; ++round) {
    gpu().fill(busy.data(), round, busy.size());
    (*staging)->begin();
    // Some rounds fill it, some are tiny, some send nothing.
    std::size_t left =
        uniform_int(0, 3) == 0 ? kBytes : static_cast<std::size_t>(uniform_int(0, 9)) * 128;
    while (left > 0) {
      const auto most = static_cast<int>(left / sizeof(std::uint32_t));
      const auto n = static_cast<std::size_t>(uniform_int(1, most));
      const auto staged = (*staging)->add<std::uint32_t>(n);
      for (std::size_t i = 0; i < n; ++i) {
        staged.host[i] = static_cast<std::uint32_t>(expected.size() * 2654435761U + 17);
        expected.push_back(staged.host[i]);
      }
      left -= DeviceStaging::bytes_of<std::uint32_t>(n);
      unsent.push_back({staged.device, n, expected.size() - n});
      // One send for several, now and then.
      if (left == 0 || uniform_int(0, 1) == 0) {
        (*staging)->send();
        for (const Staged32& sent : unsent) {
          gpu().copy(log.data() + sent.at, sent.values, sent.n * sizeof(std::uint32_t));
        }
        unsent.clear();
      }
    }
  }
  std::vector<std::uint32_t> arrived = log.to_host();
  arrived.resize(expected.size());
  EXPECT_EQ(arrived, expected);
}

}  // namespace
}  // namespace spindle::kvstore
