#include "kernels/core/cuda_context.h"

#include <gtest/gtest.h>

#include "tests/gpu/gpu_fixture.h"

namespace spindle {
namespace {

class CudaContextTest : public testing::GpuTest {};

TEST_F(CudaContextTest, CopiesGoThereAndBack) {
  const std::vector<float> values = normal(1000);
  EXPECT_EQ(upload(values).to_host(), values);
}

TEST_F(CudaContextTest, TooLargeAnAllocationIsAStatusThatNamesIt) {
  const auto buffer = gpu().allocate(std::size_t{1} << 50, "the moon");
  ASSERT_FALSE(buffer.ok());
  EXPECT_EQ(buffer.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(buffer.status().message().find("the moon"), std::string::npos);
  const std::vector<float> values = normal(10);
  EXPECT_EQ(upload(values).to_host(), values) << "the context must still work";
}

TEST(CudaContextErrors, ADeviceThatIsNotThereIsNamed) {
  const auto context = CudaContext::create(4711);
  ASSERT_FALSE(context.ok());
  EXPECT_NE(context.status().to_string().find("CUDA"), std::string::npos);
}

}  // namespace
}  // namespace spindle
