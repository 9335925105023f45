// What a head may still take, by hand. tests/kvstore/kv_store_boundary_test.cc holds it against
// stores that have exactly that many pages.

#include "kvstore/plan/kv_projection.h"

#include <gtest/gtest.h>

namespace spindle::kvstore {
namespace {

constexpr KvShape kShape{1, 32, DType::kF16, 32};
constexpr HeadPlan kRaw;
constexpr HeadPlan kInt4{.codec = {kernels::KvFormat::kInt4, kernels::KvFormat::kInt4}};

TEST(KvProjection, TailsBeginAtWholePages) {
  EXPECT_EQ(tail_begin(0, 0, 0, 100), 100);
  EXPECT_EQ(tail_begin(0, 0, 32, 100), 64);
  EXPECT_EQ(tail_begin(0, 0, 128, 100), 0);
  EXPECT_EQ(tail_begin(64, 70, 64, 100), 70) << "what left the tail does not come back";
}

TEST(KvProjection, ATailInFullPrecisionOnlyGrows) {
  const Ahead ahead{.n_tokens = 100, .granted_tokens = 164};
  EXPECT_TRUE(tail_only_grows(kRaw, ahead));
  const TailState tail{.n_pages = 4};
  EXPECT_EQ(future_tail_pages(kShape, kRaw, tail, ahead), 2);
  EXPECT_EQ(future_piece_bytes({kShape}, kRaw, tail, ahead), 0u);
}

TEST(KvProjection, ACodedTailRolls) {
  // 100 tokens, of which 64 are encoded: 36 in two pages. With 64 more it holds 100, in four.
  const Ahead ahead{.n_tokens = 100, .granted_tokens = 164, .recent = 32};
  EXPECT_FALSE(tail_only_grows(kInt4, ahead));
  const TailState tail{.origin = 64, .first = 64, .n_pages = 2, .n_own_pages = 2};
  EXPECT_EQ(future_tail_pages(kShape, kInt4, tail, ahead), 2);
  // At 164, the next boundary, the tokens before 128 leave it: two blocks, of 16 d + 128 bytes a
  // side, which divide a page of 4 KiB.
  EXPECT_EQ(future_piece_bytes({kShape}, kInt4, tail, ahead), 2u * 2 * (16 * 32 + 128));
  EXPECT_EQ(future_piece_pages(kShape, 2560), 1 + kPackingPages);
  EXPECT_EQ(future_piece_pages(kShape, 0), 0);
}

TEST(KvProjection, SharedPagesAreTakenAgain) {
  const Ahead ahead{.n_tokens = 100, .granted_tokens = 164, .recent = 32};
  const TailState tail{.origin = 64, .first = 64, .n_pages = 2, .n_own_pages = 0};
  EXPECT_EQ(future_tail_pages(kShape, kInt4, tail, ahead), 4);
}

TEST(KvProjection, LloydWantsMeansOnce) {
  constexpr HeadPlan kLloyd{.codec = {kernels::KvFormat::kLloyd4, kernels::KvFormat::kLloyd4}};
  EXPECT_TRUE(wants_mean(kLloyd, kernels::KvFormat::kLloyd4));
  EXPECT_FALSE(wants_mean(kLloyd, kernels::KvFormat::kInt4));
  const Ahead ahead{.n_tokens = 100, .granted_tokens = 164, .recent = 32};
  TailState tail{.origin = 64, .first = 64, .n_pages = 2, .n_own_pages = 2};
  const std::uint64_t with_means = future_piece_bytes({kShape}, kLloyd, tail, ahead);
  tail.has_k_mean = tail.has_v_mean = true;
  EXPECT_EQ(with_means - future_piece_bytes({kShape}, kLloyd, tail, ahead), 2u * 64);
}

}  // namespace
}  // namespace spindle::kvstore
