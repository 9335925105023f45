#include "kvstore/plan/kv_shape.h"

#include <gtest/gtest.h>

namespace spindle::kvstore {
namespace {

TEST(KvShape, BytesOfTheBundledModel) {
  const KvShape shape{2, 64, DType::kF16, 32};
  EXPECT_EQ(shape.token_bytes(), 256u);
  EXPECT_EQ(shape.page_bytes(), 8192u);
  EXPECT_EQ(full_bytes(shape, 12, 1), 6144u);
  EXPECT_EQ(full_bytes(shape, 12, 8192), 50331648u);
  // The denominator is 16 bit whatever the pages hold.
  EXPECT_EQ(full_bytes(KvShape{2, 64, DType::kF32, 32}, 12, 1), 6144u);
}

TEST(KvShape, PagesRoundUpAndSharedPagesRoundDown) {
  const KvShape shape{2, 64, DType::kF16, 32};
  EXPECT_EQ(stage_pages(shape, 3, 0), 0);
  EXPECT_EQ(stage_pages(shape, 3, 1), 6);
  EXPECT_EQ(stage_pages(shape, 3, 32), 6);
  EXPECT_EQ(stage_pages(shape, 3, 33), 12);
  EXPECT_EQ(shared_stage_pages(shape, 3, 31), 0);
  EXPECT_EQ(shared_stage_pages(shape, 3, 33), 6);
}

}  // namespace
}  // namespace spindle::kvstore
