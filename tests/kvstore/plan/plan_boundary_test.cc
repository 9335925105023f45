#include <gtest/gtest.h>

#include <random>

#include "tests/kvstore/plan/plan_fixture.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::bytes_of;
using testing::make_report;
using testing::mini_model;
using testing::mini_table;

constexpr std::int64_t kShortest = 4 + kUncompressedTokens;

std::uint64_t budget_of(double ratio, std::int64_t n_tokens) {
  const KvModel model = mini_model();
  return static_cast<std::uint64_t>(ratio * static_cast<double>(full_bytes(model, n_tokens))) -
         kAllowancePages * page_bytes(model);
}

SequencePlan plan_of(const KvPolicy& policy, const BoundaryReport& report,
                     const ProfileTable* table = nullptr) {
  auto plan = plan_boundary(policy, mini_model(), table, report);
  EXPECT_TRUE(plan.ok()) << plan.status().to_string();
  return plan.ok() ? *plan : SequencePlan{};
}

TEST(PlanBoundary, EveryProfileKeepsItsBudget) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  for (const std::int64_t n_tokens : {2000, 4000, 7800}) {
    const BoundaryReport report = make_report(model, 4, n_tokens, seed);
    for (const KvProfile profile : all_profiles()) {
      for (const double ratio : {0.5, 0.25, 0.2, 0.15, 0.1, 0.06}) {
        const KvPolicy policy{.profile = profile, .ratio = ratio};
        SCOPED_TRACE(std::string(profile_name(profile)) + " " + std::to_string(ratio) + " " +
                     std::to_string(n_tokens));
        const auto plan = plan_boundary(policy, model, &table, report);
        const Status valid = validate_policy(policy, model, n_tokens, &table);
        ASSERT_EQ(plan.ok(), valid.ok());
        if (!plan.ok()) {
          EXPECT_EQ(plan.status().code(), StatusCode::kInvalidArgument);
          continue;
        }
        const std::uint64_t bytes = bytes_of(*plan, model, n_tokens, &table);
        const std::uint64_t budget = budget_of(ratio, n_tokens);
        EXPECT_LE(bytes, budget);
        EXPECT_EQ(plan->recent % 32, 0);
        EXPECT_EQ(*plan, *plan_boundary(policy, model, &table, report));
        const double used = static_cast<double>(bytes) / static_cast<double>(budget);
        if (n_tokens == 7800)
          RecordProperty(::testing::UnitTest::GetInstance()->current_test_info()->name(),
                         std::to_string(used));
      }
    }
  }
}

// Profiles that can spend any budget do.
TEST(PlanBoundary, EvictingProfilesUseTheirBudget) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  for (const std::int64_t n_tokens : {2000, 7800}) {
    const BoundaryReport report = make_report(model, 4, n_tokens, 3);
    for (const KvProfile profile :
         {KvProfile::kSnapKv, KvProfile::kPyramidKv, KvProfile::kKeyDiff, KvProfile::kDefensive,
          KvProfile::kSpindle, KvProfile::kStreaming}) {
      for (const double ratio : {0.2, 0.15, 0.1}) {
        const KvPolicy policy{.profile = profile, .ratio = ratio};
      }
    }
  }
}

TEST(PlanBoundary, ShortPromptsStayAsTheyAre) {
  const KvModel model = mini_model();
  for (const KvProfile profile : all_profiles()) {
    const KvPolicy policy{.profile = profile, .max_bytes = 1'000'000};
    const auto report = make_report(model, 4, kShortest, 1);
    EXPECT_TRUE(is_uncompressed(plan_of(policy, report))) << profile_name(profile);
  }
  const KvPolicy int4{.profile = KvProfile::kInt4};
  EXPECT_FALSE(is_uncompressed(plan_of(int4, make_report(model, 4, kShortest + 1, 1))));
}

TEST(PlanBoundary, ProfilesHaveTheirOwnSizes) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  const auto report = make_report(model, 4, 7800, 5);
  const auto same = [&](KvProfile profile, double ratio, const ProfileTable* calibrated) {
    EXPECT_EQ(plan_of({.profile = profile}, report, calibrated),
              plan_of({.profile = profile, .ratio = ratio}, report, calibrated))
        << profile_name(profile);
  };
  for (const KvProfile profile :
       {KvProfile::kSnapKv, KvProfile::kPyramidKv, KvProfile::kKeyDiff, KvProfile::kDefensive,
        KvProfile::kSpindleKv, KvProfile::kStreaming}) {
    same(profile, 0.25, nullptr);
  }
  same(KvProfile::kSpindle, 0.10, &table);
  same(KvProfile::kSpindle, 0.15, nullptr);
}

TEST(PlanBoundary, UniformEvictionByHand) {
  const KvModel model = mini_model();
  const auto report = make_report(model, 4, 2000, 5);
  const SequencePlan plan = plan_of({.profile = KvProfile::kSnapKv, .ratio = 0.25}, report);
  // Budget 3,072,000 - 16,384, a tenth of it is less than 24 heads' 3 pages but not their 2.
  EXPECT_EQ(plan.recent, 0);
  // 127,317 bytes a head are 15 blocks with positions (8256) and 3477 more: 12 tokens and a piece
  // of positions. 492 tokens: 4 sinks, 32 of the window, 456 candidates.
  for (const HeadPlan& head : plan.heads) {
    EXPECT_EQ(plan_name(head), "EVICT raw/raw");
    EXPECT_EQ(head.selector, KvSelector::kSnapKvMean);
    EXPECT_EQ(head.n_keep, 456);
  }
}

TEST(PlanBoundary, TailShortensWithTheBudget) {
  const KvModel model = mini_model();
  const auto report = make_report(model, 4, 2000, 5);
  const auto recent = [&](double ratio) {
    return plan_of({.profile = KvProfile::kSnapKv, .ratio = ratio}, report).recent;
  };
  EXPECT_EQ(recent(0.10), 0);
  EXPECT_EQ(recent(0.40), 32);  // 48 tokens in 2 pages, 24 heads: 393,216 of 4,915,200
  EXPECT_EQ(recent(0.50), 64);  // 80 tokens in 3 pages: 589,824 of 6,144,000
  EXPECT_EQ(plan_of({.profile = KvProfile::kSnapKv, .ratio = 0.5, .recent = 31}, report).recent, 0);
  EXPECT_EQ(plan_of({.profile = KvProfile::kInt4, .recent = 127}, report).recent, 96);
}

TEST(PlanBoundary, PyramidsNarrow) {
  const KvModel model = mini_model();
  const auto report = make_report(model, 4, 4000, 5);
  for (const KvProfile profile : {KvProfile::kPyramidKv, KvProfile::kSpindleKv}) {
    const SequencePlan plan = plan_of({.profile = profile, .ratio = 0.3}, report);
    EXPECT_GT(plan.heads.front().n_keep, 3 * plan.heads.back().n_keep) << profile_name(profile);
    for (std::size_t i = 2; i < plan.heads.size(); ++i) {
      EXPECT_LE(plan.heads[i].n_keep, plan.heads[i - 2].n_keep);
    }
  }
  EXPECT_EQ(plan_name(plan_of({.profile = KvProfile::kSpindleKv, .ratio = 0.3}, report).heads[4]),
            "EVICT codebook/codebook");
}

TEST(PlanBoundary, StreamingTakesTheWindowThatFits) {
  const KvModel model = mini_model();
  const auto report = make_report(model, 4, 2000, 5);
  const SequencePlan plan = plan_of({.profile = KvProfile::kStreaming, .ratio = 0.25}, report);
  // 127,317 bytes a head: sinks and 15 pages, from token 48 * 32 on.
  EXPECT_EQ(plan_name(plan.heads[7]), "STREAM raw/raw 464");
  // A window that is asked for is taken, or refused.
  EXPECT_EQ(plan_name(plan_of({.profile = KvProfile::kStreaming, .window = 300}, report).heads[0]),
            "STREAM raw/raw 300");
  const KvPolicy both{.profile = KvProfile::kStreaming, .ratio = 0.1, .window = 1000};
  EXPECT_FALSE(plan_boundary(both, model, nullptr, report).ok());
  EXPECT_FALSE(validate_policy(both, model, 2000).ok());
  // It all but covers the prompt.
  EXPECT_TRUE(is_uncompressed(plan_of({.profile = KvProfile::kStreaming, .window = 1995}, report)));
}

TEST(PlanBoundary, LazyLayersStream) {
  const KvModel model = mini_model();
  auto report = make_report(model, 4, 4000, 5);
  report.lazy_mass = {0.1, 0.95, 0.9, 0.91, 0.2, 0.3, 0.4, 0.5, 0.99, 0.6, 0.7, 0.8};
  const auto streams = [](const SequencePlan& plan) {
    std::vector<int> layers;
    for (int layer = 0; layer < 12; ++layer) {
      const HeadPlan& head = plan.heads[static_cast<std::size_t>(2 * layer + 1)];
      EXPECT_EQ(head, plan.heads[static_cast<std::size_t>(2 * layer)]);
      if (head.mode == KvMode::kStream) layers.push_back(layer);
    }
    return layers;
  };
  KvPolicy policy{.profile = KvProfile::kSimLayerKv};
  EXPECT_EQ(streams(plan_of(policy, report)), (std::vector<int>{1, 3, 8}));
  EXPECT_EQ(plan_of(policy, report).heads[2].window, 1024);
  policy.lazy_threshold = 0.75;
  EXPECT_EQ(streams(plan_of(policy, report)), (std::vector<int>{1, 2, 3, 8, 11}));
  // By size: the laziest first. A full layer has 2 * 125 pages, a lazy one 2 * 32 and its sinks.
  policy = {.profile = KvProfile::kSimLayerKv, .ratio = 0.8};
  EXPECT_EQ(streams(plan_of(policy, report)), (std::vector<int>{1, 2, 3, 8}));
  policy = {.profile = KvProfile::kSimLayerKvInt4, .window = 256};
  const SequencePlan int4 = plan_of(policy, report);
  EXPECT_EQ(plan_name(int4.heads[0]), "FULL kivi4/kivi4");
  EXPECT_EQ(plan_name(int4.heads[2]), "STREAM kivi4/kivi4 256");
}

TEST(PlanBoundary, OwnSizesGrowForShortPrompts) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  // The size is at least that of 128 tokens as they are.
  EXPECT_TRUE(is_uncompressed(
      plan_of({.profile = KvProfile::kSpindle}, make_report(model, 4, 128, 1), &table)));
  for (const std::int64_t n_tokens : {129, 200, 400, 1000}) {
    const SequencePlan plan =
        plan_of({.profile = KvProfile::kSpindle}, make_report(model, 4, n_tokens, 1), &table);
    EXPECT_FALSE(is_uncompressed(plan));
    EXPECT_LE(bytes_of(plan, model, n_tokens), full_bytes(model, 128));
  }
  // A server's default ratio gives way, a request's own does not.
  const auto report = make_report(model, 4, 150, 1);
  KvPolicy policy{.profile = KvProfile::kSnapKv, .ratio = 0.1};
  EXPECT_FALSE(plan_boundary(policy, model, nullptr, report).ok());
  policy.best_effort = true;
  EXPECT_TRUE(plan_boundary(policy, model, nullptr, report).ok());
}

TEST(PlanBoundary, TheBoostCoversWhatTheProfilesOwnSizeKeeps) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  // A token of one side is 4,096 / 32 bytes raw, (1,024 + 64) / 32 in lloyd4, (1,024 + 128) / 32 in
  // int4.
  const KvPolicy spindle{.profile = KvProfile::kSpindle};
  EXPECT_NEAR(boost_share(spindle, model, &table, 4000), 0.10 * 4096 / 1088, 1e-12);
  EXPECT_NEAR(boost_share(spindle, model, nullptr, 4000), 0.15 * 4096 / 1088, 1e-12);
  const KvPolicy defensive{.profile = KvProfile::kDefensive, .ratio = 0.2};
  EXPECT_NEAR(boost_share(defensive, model, nullptr, 4000), 0.2 * 4096 / 1152, 1e-12);
  EXPECT_EQ(boost_share({.profile = KvProfile::kDefensive, .ratio = 0.9}, model, nullptr, 4000), 1);
}

TEST(PlanBoundary, OverridesReplaceWhatTheProfileDecided) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  const auto report = make_report(model, 4, 7800, 5);
  KvPolicy policy{.profile = KvProfile::kSpindle, .ratio = 0.15};
  policy.overrides = {
      {.first_layer = 3, .last_layer = 4, .mode = KvMode::kStream, .window = 128},
      {.first_layer = 4,
       .last_layer = 4,
       .kv_head = 1,
       .codec = KvCodec{KvFormat::kInt4, KvFormat::kInt4}},
      {.first_layer = 6, .last_layer = 6, .kv_head = 0, .keep_ratio = 0.5},
      {.first_layer = 7, .last_layer = 7, .kv_head = 0, .mode = KvMode::kFull},
      {.first_layer = 0, .last_layer = 0, .kv_head = 0, .keep_ratio = 0.1},
  };
  EXPECT_TRUE(validate_policy(policy, model, 7800, &table).ok());
  const SequencePlan plan = plan_of(policy, report, &table);
  EXPECT_EQ(plan.heads[6].mode, KvMode::kStream);
  EXPECT_EQ(plan.heads[6].window, 128);
  EXPECT_EQ(plan_name(plan.heads[9]), "STREAM int4/int4 128");
  EXPECT_EQ(plan.heads[12].n_keep, 3882);  // half of 7764
  EXPECT_EQ(plan.heads[14].mode, KvMode::kFull);
  EXPECT_EQ(plan_name(plan.heads[0]), "EVICT raw/raw");
  EXPECT_EQ(plan_name(plan.heads[1]), "FULL token");
  const std::uint64_t budget = budget_of(0.15, 7800);
  const std::uint64_t bytes = bytes_of(plan, model, 7800, &table);
  EXPECT_LE(bytes, budget);
  EXPECT_GE(static_cast<double>(bytes), 0.97 * static_cast<double>(budget));
  // Too much for the budget: refused, with the floor.
  policy.overrides = {
      {.first_layer = 0, .last_layer = 5, .mode = KvMode::kFull, .codec = KvCodec{}}};
  const auto refused = plan_boundary(policy, model, &table, report);
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("needs at least 0.50"), std::string::npos)
      << refused.status().message();
}

TEST(PlanBoundary, LaterBoundariesKeepModesAndSpendTheShareOfNewTokens) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  for (const KvProfile profile : all_profiles()) {
    SCOPED_TRACE(std::string(profile_name(profile)));
    const KvPolicy policy{.profile = profile};
    const SequencePlan first = plan_of(policy, make_report(model, 4, 4000, 5), &table);
    if (is_uncompressed(first)) continue;
    for (const std::int64_t added : {64, 3000}) {
      const std::int64_t n_tokens = 4000 + added;
      BoundaryReport report = make_report(model, 0, added + tail_length(first.recent, 4000), 6);
      report.n_new_tokens = report.n_tokens;
      report.n_tokens = n_tokens;
      report.earlier = &first;
      const SequencePlan later = plan_of(policy, report, &table);
      EXPECT_EQ(later.recent, first.recent);
      std::uint64_t blocks = 0;
      for (std::size_t i = 0; i < later.heads.size(); ++i) {
        EXPECT_EQ(later.heads[i].mode, first.heads[i].mode);
        EXPECT_EQ(later.heads[i].codec, first.heads[i].codec);
        EXPECT_EQ(later.heads[i].window, first.heads[i].window);
        EXPECT_LE(later.heads[i].n_keep, report.n_candidates);
        if (later.heads[i].mode == KvMode::kEvict) {
          blocks += head_block_bytes(later.heads[i], model,
                                     later.heads[i].n_keep + (first.recent == 0 ? 32 : 0),
                                     &table.heads[i]);
        }
      }
      const bool sized = profile != KvProfile::kInt4 && profile != KvProfile::kKivi4 &&
                         profile != KvProfile::kKivi2;
      if (added == 3000 && sized) {
        EXPECT_LE(static_cast<double>(blocks), 0.25 * static_cast<double>(full_bytes(model, 3000)));
      }
    }
  }
}

TEST(PlanBoundary, ReportsThatLackWhatWasAskedForAreErrors) {
  const KvModel model = mini_model();
  BoundaryReport report = make_report(model, 4, 2000, 5);
  report.histograms.pop_back();
  EXPECT_EQ(plan_boundary({.profile = KvProfile::kSpindle}, model, nullptr, report).status().code(),
            StatusCode::kInternal);
  report.lazy_mass.clear();
  EXPECT_EQ(
      plan_boundary({.profile = KvProfile::kSimLayerKv}, model, nullptr, report).status().code(),
      StatusCode::kInternal);
  const SequencePlan earlier{.heads = std::vector<HeadPlan>(24, {.mode = KvMode::kEvict})};
  report.earlier = &earlier;
  report.n_new_tokens = 0;
  EXPECT_EQ(plan_boundary({.profile = KvProfile::kSnapKv}, model, nullptr, report).status().code(),
            StatusCode::kInternal);
  report.earlier = nullptr;
  ProfileTable table = mini_table();
  table.heads.pop_back();
  EXPECT_EQ(plan_boundary({.profile = KvProfile::kSnapKv}, model, &table, report).status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace spindle::kvstore
