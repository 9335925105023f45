#include "kernels/convert.h"

#include <gtest/gtest.h>

#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

class ConvertCudaTest : public testing::GpuTest {};

TEST_F(ConvertCudaTest, RowsAreRoundedAsOnTheHost) {
  constexpr std::int64_t kRows = 7;
  constexpr std::int64_t kWidth = 33;
  constexpr std::int64_t kStride = 40;
  const std::vector<float> x = normal(kRows * kStride, 100.0F);
  const auto device_x = upload(x);
  const auto out = device<F16>(kRows * kWidth);
  convert(gpu(), ConstRows(device_x.data(), kRows, kWidth, kStride),
          F16Rows(out.data(), kRows, kWidth));
  const std::vector<F16> rounded = out.to_host();
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t i = 0; i < kWidth; ++i) {
      ASSERT_EQ(rounded[static_cast<std::size_t>(row * kWidth + i)].bits,
                f32_to_f16(x[static_cast<std::size_t>(row * kStride + i)]));
    }
  }
  convert(gpu(), ConstRows(device_x.data(), 0, kWidth), F16Rows(out.data(), 0, kWidth));
  out.check_guard();
}

}  // namespace
}  // namespace spindle::kernels
