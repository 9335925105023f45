#include "kernels/activation.h"

#include <gtest/gtest.h>

#include "kernels/core/cpu_context.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

class ActivationCudaTest : public testing::GpuTest {
 protected:
  void check(std::int64_t n_rows, std::int64_t inter, std::int64_t gap, float scale = 2.0F) {
    SCOPED_TRACE(::testing::Message() << n_rows << " rows of " << inter << ", gap " << gap);
    const std::int64_t in_stride = 2 * inter + gap;
    const std::int64_t out_stride = inter + gap;
    const std::vector<float> in = normal(static_cast<std::size_t>(n_rows * in_stride), scale);
    std::vector<float> expected(static_cast<std::size_t>(n_rows * inter));
    const auto cpu = CpuContext::create({.n_threads = 1}).value();
    swiglu(*cpu, ConstRows(in.data(), n_rows, 2 * inter, in_stride),
           Rows(expected.data(), n_rows, inter));
    const auto device_in = upload(in);
    const auto out = device<Bf16>(static_cast<std::size_t>(n_rows * out_stride));
    swiglu(gpu(), ConstRows(device_in.data(), n_rows, 2 * inter, in_stride),
           Bf16Rows(out.data(), n_rows, inter, out_stride));
    const std::vector<Bf16> got = out.to_host();
    std::vector<float> values;
    for (std::int64_t i = 0; i < n_rows * out_stride; ++i) {
      const Bf16 value = got[static_cast<std::size_t>(i)];
      if (i % out_stride < inter) {
        values.push_back(bf16_to_f32(value.bits));
      } else {
        ASSERT_EQ(value.bits, 0xabab) << "written between rows";
      }
    }
    // Half a step of 2^-7 and the error of a fast exp; far out the CPU's exp is cut to zero.
    testing::expect_close(values, expected, 1e-30F, 1.02F / 256, "swiglu");
  }
};

TEST_F(ActivationCudaTest, EqualsTheCpuBody) {
  for (const std::int64_t inter : {1, 5, 8, 264, 2048, 14336}) {
    for (const std::int64_t n_rows : {0, 1, 3, 70}) check(n_rows, inter, 0);
  }
}

TEST_F(ActivationCudaTest, RowsMayLieApart) {
  check(9, 264, 8);
  check(9, 264, 3);
}

TEST_F(ActivationCudaTest, LargeGatesStayFinite) { check(4, 512, 0, 25.0F); }

}  // namespace
}  // namespace spindle::kernels
