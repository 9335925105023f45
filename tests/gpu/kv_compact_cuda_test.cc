#include "kernels/kv_compact.h"

#include <gtest/gtest.h>

#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

class KvCompactCudaTest : public testing::GpuTest {
 protected:
  // Copies of these sizes, every third of zeros, between 16-byte gaps that must stay.
  void check_copies(const std::vector<std::size_t>& sizes) {
    std::size_t total = 0;
    for (const std::size_t size : sizes) total += size + 16;
    std::vector<std::byte> source(total);
    for (std::byte& byte : source) byte = static_cast<std::byte>(uniform_int(0, 255));
    const auto from = upload(source);
    const auto to = device<std::byte>(total);
    std::vector<std::byte> expected(total, std::byte{0xab});
    std::vector<DeviceCopy> copies;
    std::size_t at = 0;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const bool zeros = i % 3 == 2;
      copies.push_back({zeros ? nullptr : from.data() + at, to.data() + at, sizes[i]});
      for (std::size_t j = at; j < at + sizes[i]; ++j) {
        expected[j] = zeros ? std::byte{0} : source[j];
      }
      at += sizes[i] + 16;
    }
    const auto list = upload(copies);
    kv_copy(gpu(), list.data(), static_cast<int>(copies.size()));
    EXPECT_EQ(to.to_host(), expected);
  }
};

TEST_F(KvCompactCudaTest, CopiesOfManySizesAndZeros) {
  std::vector<std::size_t> sizes = {0, 16, 32, 64, 2048, 8176, 8192, 8208, 16384};
  for (int i = 0; i < 300; ++i) sizes.push_back(static_cast<std::size_t>(uniform_int(0, 600)) * 16);
  check_copies(sizes);
}

TEST_F(KvCompactCudaTest, OneLargeCopy) { check_copies({(std::size_t{5} << 20) + 48}); }

TEST_F(KvCompactCudaTest, NoCopies) {
  kv_copy(gpu(), nullptr, 0);
  gpu().synchronize();
}

}  // namespace
}  // namespace spindle::kernels
