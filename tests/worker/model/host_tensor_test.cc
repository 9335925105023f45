#include "worker/model/host_tensor.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

namespace spindle::model {
namespace {

TEST(HostTensor, IsAligned) {
  for (const std::int64_t n : {1, 3, 63, 64, 1000}) {
    const auto tensor = make_host_tensor(DType::kF16, {n, 3});
    ASSERT_TRUE(tensor.ok());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor->data.bytes().data()) % 64, 0u);
    EXPECT_EQ(tensor->data.bytes().size(), static_cast<std::size_t>(n) * 6);
    EXPECT_EQ(tensor->n_elements(), n * 3);
  }
}

TEST(HostTensor, EmptyTensorHasNoBytes) {
  const auto tensor = make_host_tensor(DType::kF32, {0, 5});
  ASSERT_TRUE(tensor.ok());
  EXPECT_TRUE(tensor->data.bytes().empty());
}

TEST(HostTensor, RefusesImpossibleSizes) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(make_host_tensor(DType::kF32, {kMax, kMax}).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(make_host_tensor(DType::kF32, {-1}).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace spindle::model
