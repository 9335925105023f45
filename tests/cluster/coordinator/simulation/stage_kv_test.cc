// Pages of a simulated stage, small enough to count by hand.

#include "cluster/coordinator/simulation/stage_kv.h"

#include <gtest/gtest.h>

#include "kvstore/plan/kv_demand.h"

namespace spindle::coordinator::simulation {
namespace {

constexpr kvstore::KvShape kShape{2, 32, DType::kF16, 32};

// One layer of two heads of a model of two.
StageKvConfig small_stage(std::int64_t n_pages) {
  StageKvConfig config;
  config.shape = kShape;
  config.model = {.n_layers = 2,
                  .n_heads = 4,
                  .n_kv_heads = 2,
                  .head_dim = 32,
                  .vocab_size = 100,
                  .max_model_len = 1000};
  config.first_layer = 1;
  config.n_layers = 1;
  config.n_pages = n_pages;
  return config;
}

Status extend(StageKv& kv, std::uint64_t sequence, std::int64_t n_tokens) {
  std::int64_t n_pages = 0;
  Status status = kv.extend(sequence, n_tokens, n_pages);
  EXPECT_EQ(n_pages, status.ok() ? kv.n_pages(sequence) : 0);
  return status;
}

control::Compress int4_order(std::uint64_t sequence, int n_tokens) {
  control::Compress order;
  order.set_sequence(sequence);
  order.set_n_tokens(n_tokens);
  order.set_sinks(4);
  order.set_recent(32);
  order.set_selects(true);
  const kernels::KvCodec codec = *kvstore::parse_codec("int4");
  for (int i = 0; i < 4; ++i) {
    control::HeadPlan& head = *order.add_heads();
    head.set_k_format(static_cast<std::int32_t>(codec.k));
    head.set_v_format(static_cast<std::int32_t>(codec.v));
  }
  return order;
}

TEST(StageKv, ASequenceTakesWhatItReserved) {
  StageKv kv(small_stage(10));
  ASSERT_TRUE(kv.open(1, 70, 6).ok());
  EXPECT_EQ(kv.book().n_reserved(), 6);
  ASSERT_TRUE(extend(kv, 1, 33).ok());
  EXPECT_EQ(kv.n_pages(1), 4);  // two heads, two pages each
  EXPECT_EQ(kv.book().n_used(), 4);
  EXPECT_EQ(kv.book().n_reserved(), 2);
  EXPECT_EQ(kv.open(2, 10, 5).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(extend(kv, 1, 40).code(), StatusCode::kInvalidArgument) << "more than 70 tokens";
  EXPECT_TRUE(kv.check().ok());
}

TEST(StageKv, ASequenceCannotTakeMoreThanItReserved) {
  StageKv kv(small_stage(10));
  ASSERT_TRUE(kv.open(1, 70, 3).ok());
  EXPECT_EQ(extend(kv, 1, 33).code(), StatusCode::kResourceExhausted);
}

TEST(StageKv, ForksShareFullPages) {
  StageKv kv(small_stage(20));
  ASSERT_TRUE(kv.open(1, 64, 4).ok());
  ASSERT_TRUE(extend(kv, 1, 40).ok());
  ASSERT_TRUE(kv.fork(1, 2, 40, 64, 2).ok());
  EXPECT_EQ(kv.n_pages(2), 4);
  EXPECT_EQ(kv.book().n_used(), 6);  // the first page of each head is shared
  EXPECT_TRUE(kv.check().ok());
  control::FreedSequence freed;
  ASSERT_TRUE(kv.free(1, freed).ok());
  EXPECT_EQ(freed.kept_bytes(), 4 * kShape.page_bytes());
  EXPECT_EQ(kv.book().n_used(), 4);
  ASSERT_TRUE(kv.free(2, freed).ok());
  EXPECT_EQ(kv.book().n_used(), 0);
  EXPECT_EQ(kv.book().n_reserved(), 0);
  EXPECT_TRUE(kv.check().ok());
}

TEST(StageKv, ABoundaryGivesBackWhatItsPlanDrops) {
  StageKv kv(small_stage(100));
  const kvstore::KvDemand demand{.prompt_tokens = 320,
                                 .max_tokens = 330,
                                 .n_choices = 1,
                                 .compresses = true,
                                 .n_boundaries = 1,
                                 .tail_tokens = 32};
  const std::int64_t reserve = kvstore::reserve_pages(kShape, 1, demand, false);
  ASSERT_TRUE(kv.open(1, 330, reserve).ok());
  ASSERT_TRUE(extend(kv, 1, 320).ok());
  EXPECT_EQ(kv.n_pages(1), 20);
  control::CompressedSequence report;
  ASSERT_TRUE(kv.compress(int4_order(1, 320), report).ok());
  // A tail of one page for each head. Of 4096 bytes of raw page, 288 tokens in int4 take 40 each.
  const kvstore::HeadPlan plan{.codec = *kvstore::parse_codec("int4")};
  const std::uint64_t bytes = 2 * kvstore::head_body_bytes(plan, small_stage(1).model, 4, 288);
  const auto packed =
      static_cast<std::int64_t>((bytes + kShape.page_bytes() - 1) / kShape.page_bytes());
  EXPECT_EQ(report.used_pages(), 2 + packed);
  EXPECT_LT(report.used_pages(), 10);
  EXPECT_EQ(report.used_pages(), kv.book().n_used());
  EXPECT_EQ(report.reserved_pages(), kv.book().n_reserved());
  EXPECT_LE(report.used_pages() + report.reserved_pages(), reserve);
  EXPECT_TRUE(kv.check().ok());
  EXPECT_TRUE(extend(kv, 1, 10).ok());
}

TEST(StageKv, ABoundaryIsAtTheSequencesLength) {
  StageKv kv(small_stage(100));
  ASSERT_TRUE(kv.open(1, 330, 60).ok());
  ASSERT_TRUE(extend(kv, 1, 100).ok());
  control::CompressedSequence report;
  EXPECT_EQ(kv.compress(int4_order(1, 101), report).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(kv.compress(int4_order(2, 100), report).code(), StatusCode::kInvalidArgument);
}

TEST(StageKv, ALeakIsFound) {
  StageKv kv(small_stage(10));
  ASSERT_TRUE(kv.leak_page().ok());
  EXPECT_EQ(kv.check().code(), StatusCode::kInternal);
}

}  // namespace
}  // namespace spindle::coordinator::simulation
