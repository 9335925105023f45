#include "kvstore/plan/expected_use.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "kvstore/plan/kv_projection.h"
#include "tests/kvstore/test_store.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;

constexpr KvCodec kInt4{KvFormat::kInt4, KvFormat::kInt4};
constexpr KvCodec kKivi4{KvFormat::kKivi4, KvFormat::kKivi4};
constexpr KvCodec kLloyd{KvFormat::kLloyd4, KvFormat::kLloyd3};
constexpr KvCodec kToken{KvFormat::kToken, KvFormat::kToken};

KvModel small_model() {
  return {.n_layers = 2,
          .n_heads = 4,
          .n_kv_heads = 2,
          .head_dim = 32,
          .vocab_size = 60,
          .max_model_len = 8192};
}

TEST(ExpectedUse, InFullPrecisionByHand) {
  const KvModel model = small_model();
  const SequencePlan plan = uncompressed_plan({}, model);
  // Layer 1 alone: two heads, 100 tokens in 4 pages each, 36 more in 5.
  const ExpectedUse use = expected_use(plan, model, nullptr, {1, 1}, 100, 0, 136);
  EXPECT_EQ(use.used_pages, 2 * 4);
  EXPECT_EQ(use.reserved_pages, 2 * 1);
  EXPECT_EQ(use.bytes, 8 * page_bytes(model));
  EXPECT_EQ(expected_use(plan, model, nullptr, {0, 2}, 100, 64, 164).used_pages, 4 * 6);
}

TEST(ExpectedUse, PlansForAPromptThatNobodyHasSeen) {
  const KvModel model = small_model();
  KvPolicy policy{.profile = KvProfile::kSnapKv, .ratio = 0.25};
  const auto plan = expected_plan(policy, model, nullptr, 2000);
  ASSERT_TRUE(plan.ok()) << plan.status().to_string();
  const ExpectedUse use = expected_use(*plan, model, nullptr, {0, 2}, 2000, 0, 2064);
  EXPECT_LE(use.bytes, full_bytes(model, 2000) / 4);
  EXPECT_GT(use.bytes, full_bytes(model, 2000) / 5);
  policy.ratio = 0.0001;
  EXPECT_EQ(expected_plan(policy, model, nullptr, 2000).status().code(),
            StatusCode::kInvalidArgument);
}

// A store that carries out the same plan holds and promises as much.
struct Case {
  const char* name;
  HeadPlan first;   // of layer 0
  HeadPlan second;  // of layer 1
  int recent = 64;
  std::int64_t n_gap_pages = kAllowancePages;  // held beside what is expected, at most
};

class ExpectedUseInStore : public ::testing::TestWithParam<Case> {};

// Gaps between pieces are not expected.
void expect_use(const SequencePages& pages, const ExpectedUse& use, std::int64_t n_gap_pages,
                const std::string& where) {
  EXPECT_GE(pages.used, use.used_pages) << where;
  EXPECT_LE(pages.used, use.used_pages + n_gap_pages) << where;
  EXPECT_EQ(pages.reserved, use.reserved_pages) << where;
}

TEST_P(ExpectedUseInStore, IsWhatTheStoreHolds) {
  const Case& given = GetParam();
  const KvModel model = small_model();
  SequencePlan plan;
  plan.recent = given.recent;
  plan.heads = {given.first, given.first, given.second, given.second};
  testing::TestStore::Options options;
  options.n_pages = 4000;
  for (const std::int64_t n_prompt : {300, 417, 512}) {
    testing::TestStore store(options);
    const std::int64_t most = n_prompt + 256;
    ASSERT_TRUE(store.open(1, most, 1000, n_prompt + kGeneratedBoundary).ok());
    ASSERT_TRUE(store.extend(1, n_prompt).ok());
    const testing::TestBoundary boundary{
        .sinks = plan.sinks, .recent = plan.recent, .heads = plan.heads};
    const auto prompt = store.compress(1, boundary);
    ASSERT_TRUE(prompt.ok()) << prompt.status().to_string();
    expect_use(prompt->pages,
               expected_use(plan, model, nullptr, {0, 2}, n_prompt, 0, n_prompt + 64),
               given.n_gap_pages,
               given.name + std::string(" after the prompt of ") + std::to_string(n_prompt));
    for (std::int64_t generated = 64; generated < 256; generated += 64) {
      ASSERT_TRUE(store.extend(1, 64).ok());
      const auto later = store.compress(1, boundary);
      ASSERT_TRUE(later.ok()) << later.status().to_string();
      const std::int64_t n = n_prompt + generated;
      const auto grown = store.store().grow(1, n + 64, 1000, plan.sinks, plan.recent);
      ASSERT_TRUE(grown.ok()) << grown.status().to_string();
      expect_use(*grown, expected_use(plan, model, nullptr, {0, 2}, n_prompt, generated, n + 64),
                 given.n_gap_pages, given.name + std::string(" at ") + std::to_string(n));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Plans, ExpectedUseInStore,
    ::testing::Values(
        Case{"raw", {}, {}}, Case{"int4", {.codec = kInt4}, {.codec = kInt4}},
        // What is left over of whole blocks is raw.
        Case{"kivi4 without a tail", {.codec = kKivi4}, {.codec = kKivi4}, 0, 4},
        Case{"lloyd", {.codec = kLloyd}, {.codec = kLloyd}, 32},
        Case{"token ids and raw", {.codec = kToken}, {}},
        Case{
            "a window", {.codec = kInt4}, {.mode = KvMode::kStream, .codec = kInt4, .window = 128}},
        Case{"a window in full precision", {}, {.mode = KvMode::kStream, .window = 96}}),
    [](const auto& given) {
      std::string name = given.param.name;
      std::replace(name.begin(), name.end(), ' ', '_');
      return name;
    });

}  // namespace
}  // namespace spindle::kvstore
