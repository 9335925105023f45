#include <gtest/gtest.h>

#include "kernels/core/cpu_context.h"
#include "kernels/norm.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

class NormCudaTest : public testing::GpuTest {
 protected:
  // Rounding to bf16 is half a step of 2^-7; the fp32 sums differ in order only.
  void check(std::int64_t n_rows, std::int64_t width, std::int64_t gap, float scale = 1.0F) {
    SCOPED_TRACE(::testing::Message() << n_rows << " rows of " << width << ", gap " << gap);
    const std::int64_t stride = width + gap;
    const auto n = static_cast<std::size_t>(n_rows * stride);
    const std::vector<float> x = normal(n, scale);
    const std::vector<float> weight = normal(static_cast<std::size_t>(width));
    const float eps = 1e-5F;
    std::vector<float> expected(static_cast<std::size_t>(n_rows * width));
    const auto cpu = CpuContext::create({.n_threads = 1}).value();
    rms_norm(*cpu, ConstRows(x.data(), n_rows, width, stride), weight, eps,
             Rows(expected.data(), n_rows, width));
    const auto device_x = upload(x);
    const auto device_weight = upload(weight);
    const auto out = device<Bf16>(n);
    rms_norm(gpu(), ConstRows(device_x.data(), n_rows, width, stride), device_weight.data(), eps,
             Bf16Rows(out.data(), n_rows, width, stride));
    const std::vector<Bf16> got = out.to_host();
    std::vector<float> values;
    for (std::int64_t i = 0; i < n_rows * stride; ++i) {
      const Bf16 value = got[static_cast<std::size_t>(i)];
      if (i % stride < width) {
        values.push_back(bf16_to_f32(value.bits));
      } else {
        ASSERT_EQ(value.bits, 0xabab) << "written between rows";
      }
    }
    testing::expect_close(values, expected, 1e-30F, 1.01F / 256, "rms_norm");
  }
};

TEST_F(NormCudaTest, EqualsTheCpuBody) {
  for (const std::int64_t width : {1, 7, 64, 768, 1000, 2048, 4096, 8192, 12288, 16384, 20000}) {
    for (const std::int64_t n_rows : {0, 1, 3, 200}) check(n_rows, width, 0);
  }
}

TEST_F(NormCudaTest, RowsMayLieApart) {
  check(5, 768, 4, 30.0F);
  check(5, 768, 3, 1e-3F);
  check(5, 4096, 64);
}

TEST_F(NormCudaTest, ARowDoesNotDependOnTheOthers) {
  const std::vector<float> x = normal(300 * 4096);
  const std::vector<float> weight = normal(4096);
  const auto device_x = upload(x);
  const auto device_weight = upload(weight);
  const auto many = device<Bf16>(300 * 4096);
  const auto one = device<Bf16>(4096);
  rms_norm(gpu(), ConstRows(device_x.data(), 300, 4096), device_weight.data(), 1e-6F,
           Bf16Rows(many.data(), 300, 4096));
  rms_norm(gpu(), ConstRows(device_x.data() + 17 * 4096, 1, 4096), device_weight.data(), 1e-6F,
           Bf16Rows(one.data(), 1, 4096));
  const std::vector<Bf16> all = many.to_host();
  const std::vector<Bf16> single = one.to_host();
  EXPECT_EQ(std::memcmp(all.data() + 17 * 4096, single.data(), 4096 * sizeof(Bf16)), 0);
}

}  // namespace
}  // namespace spindle::kernels
