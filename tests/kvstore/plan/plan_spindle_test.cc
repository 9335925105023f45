#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "tests/kvstore/plan/plan_fixture.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;
using testing::bytes_of;
using testing::make_report;
using testing::mini_model;
using testing::mini_table;

SequencePlan spindle(double ratio, const BoundaryReport& report, const ProfileTable* table) {
  auto plan =
      plan_boundary({.profile = KvProfile::kSpindle, .ratio = ratio}, mini_model(), table, report);
  EXPECT_TRUE(plan.ok()) << plan.status().to_string();
  return plan.ok() ? *plan : SequencePlan{};
}

TEST(PlanSpindle, GuardsRetrievalHeads) {
  const ProfileTable table = mini_table();
  const auto report = make_report(mini_model(), 4, 7800, 1);
  const SequencePlan ten = spindle(0.10, report, &table);
  EXPECT_EQ(plan_name(ten.heads[0]), "FULL token");
  EXPECT_EQ(plan_name(ten.heads[1]), "FULL token");
  EXPECT_EQ(plan_name(ten.heads[18]), "FULL raw/lloyd4");
  EXPECT_EQ(plan_name(ten.heads[23]), "FULL lloyd4/lloyd4");
  EXPECT_EQ(plan_name(ten.heads[11]), "FULL lloyd4/lloyd4");
  for (std::size_t i = 2; i < ten.heads.size(); ++i) {
    if (i == 18 || i == 23 || i == 11) continue;
    EXPECT_EQ(plan_name(ten.heads[i]), "EVICT lloyd4/lloyd4");
    EXPECT_EQ(ten.heads[i].selector, KvSelector::kDefensive);
  }
  // Small budgets: no raw keys where other guarded heads would pay for them, and fewer bits for the
  // rest when few of its tokens fit.
  const SequencePlan six = spindle(0.06, report, &table);
  EXPECT_EQ(plan_name(six.heads[18]), "FULL lloyd4/lloyd4");
  EXPECT_EQ(plan_name(six.heads[23]), "FULL lloyd4/lloyd4");
  EXPECT_EQ(plan_name(six.heads[4]), "EVICT lloyd3/lloyd2");
  const SequencePlan tight = spindle(0.03, report, &table);
  EXPECT_EQ(plan_name(tight.heads[18]), "FULL lloyd4/lloyd4");
  EXPECT_NE(plan_name(tight.heads[23]), "FULL lloyd4/lloyd4");
  EXPECT_EQ(plan_name(tight.heads[4]), "EVICT lloyd3/lloyd2");
}

TEST(PlanSpindle, SpendsItsBudgetInWholeBlocks) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  const auto report = make_report(model, 4, 7800, seed);
  for (const double ratio : {0.25, 0.2, 0.15, 0.1, 0.06, 0.03}) {
    const SequencePlan plan = spindle(ratio, report, &table);
    const auto full = static_cast<double>(full_bytes(model, 7800));
    const double budget = ratio * full - 2 * 8192;
    const auto bytes = static_cast<double>(bytes_of(plan, model, 7800, &table));
    EXPECT_LE(bytes, budget) << ratio;
    EXPECT_GE(bytes, 0.995 * budget - 2240) << ratio;
    for (const HeadPlan& head : plan.heads) {
      if (head.mode == KvMode::kEvict) {
        EXPECT_TRUE(head.n_keep % 32 == 0 || head.n_keep == report.n_candidates) << head.n_keep;
      }
    }
  }
}

TEST(PlanSpindle, WhatIsLeftBuysPrecision) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  const auto report = make_report(model, 4, 7800, 1);
  const SequencePlan plan = spindle(0.5, report, &table);
  const double budget = 0.5 * static_cast<double>(full_bytes(model, 7800)) - 2 * 8192;
  const auto bytes = static_cast<double>(bytes_of(plan, model, 7800, &table));
  // One side of one head from four bits to 16 is 1.5 % of the model's bytes.
  EXPECT_LE(bytes, budget);
  EXPECT_GE(bytes, budget - 0.016 * static_cast<double>(full_bytes(model, 7800)));
  EXPECT_EQ(plan_name(plan.heads[18]), "FULL raw/raw");
  for (const HeadPlan& head : plan.heads) EXPECT_EQ(head.mode, KvMode::kFull);
}

TEST(PlanSpindle, WithoutATableTokensAndLloyd4) {
  const KvModel model = mini_model();
  const auto report = make_report(model, 4, 7800, 1);
  const SequencePlan plan = spindle(0.1, report, nullptr);
  EXPECT_EQ(plan_name(plan.heads[1]), "FULL token");
  for (std::size_t i = 2; i < plan.heads.size(); ++i) {
    EXPECT_EQ(plan_name(plan.heads[i]), "EVICT lloyd4/lloyd4");
  }
  KvModel untied = model;
  untied.token_table = false;
  const auto all =
      plan_boundary({.profile = KvProfile::kSpindle, .ratio = 0.1}, untied, nullptr, report);
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(plan_name(all->heads[0]), "EVICT lloyd4/lloyd4");
}

// A request's own table of ids takes the place of what layer 0 would get where it is no larger.
TEST(PlanSpindle, WithoutATokenTableLayerZeroHoldsIdsWhereThatIsNoLarger) {
  const ProfileTable table = mini_table();
  KvModel model = mini_model();
  model.token_table = false;
  auto report = make_report(model, 4, 7800, 1);
  const auto planned = [&](double ratio, std::int64_t n_ids, const ProfileTable* calibrated) {
    report.n_new_ids = n_ids;
    const auto plan =
        plan_boundary({.profile = KvProfile::kSpindle, .ratio = ratio}, model, calibrated, report);
    EXPECT_TRUE(plan.ok()) << plan.status().to_string();
    return plan.ok() ? *plan : SequencePlan{};
  };
  const auto bytes = [&](const SequencePlan& plan, std::int64_t n_ids) {
    return plan_bytes(plan, model, 7800, tail_length(plan.recent, 7800), nullptr, n_ids);
  };
  const std::string token = "FULL token";
  for (const ProfileTable* calibrated : {&table, static_cast<const ProfileTable*>(nullptr)}) {
    for (const double ratio : {0.5, 0.25, 0.1}) {
      const SequencePlan never = planned(ratio, -1, calibrated);
      std::uint64_t other = 0;  // what layer 0 takes without ids
      for (std::size_t i = 0; i < 2; ++i) {
        EXPECT_NE(plan_name(never.heads[i]), token);
        other += head_bytes(never.heads[i], model, 4, 7800, tail_length(never.recent, 7800));
      }
      bool before = true;
      int n_changes = 0;
      for (std::int64_t n_ids = 50; n_ids < 7800; n_ids += 250) {
        SCOPED_TRACE(std::to_string(ratio) + ", ids " + std::to_string(n_ids));
        const SequencePlan plan = planned(ratio, n_ids, calibrated);
        EXPECT_LE(bytes(plan, n_ids),
                  static_cast<std::uint64_t>(ratio * static_cast<double>(full_bytes(model, 7800))));
        const bool holds = plan_name(plan.heads[0]) == token || plan_name(plan.heads[1]) == token;
        n_changes += holds == before ? 0 : 1;
        before = holds;
        const std::uint64_t own = 2 * head_bytes({.codec = {KvFormat::kToken, KvFormat::kToken}},
                                                 model, 4, 7800, 0, nullptr, n_ids);
        if (plan_name(plan.heads[0]) == token && plan_name(plan.heads[1]) == token) {
          EXPECT_LE(own, other);
        } else if (!holds) {
          EXPECT_GT(own, other);
        }
      }
      // Few ids pay, many do not.
      EXPECT_EQ(n_changes, 1);
      EXPECT_FALSE(before);
    }
  }
  // What the ids save goes to the other heads.
  const auto kept = [](const SequencePlan& plan) {
    return std::accumulate(
        plan.heads.begin() + 2, plan.heads.end(), std::int64_t{0},
        [](std::int64_t sum, const HeadPlan& head) { return sum + head.n_keep; });
  };
  EXPECT_GT(kept(planned(0.1, 50, &table)), kept(planned(0.1, -1, &table)));
  // The whole vocabulary's table costs less still.
  EXPECT_GT(kept(spindle(0.1, report, &table)), kept(planned(0.1, 50, &table)));
}

TEST(PlanSpindle, AnOverrideHoldsIdsWhateverTheyCost) {
  KvModel model = mini_model();
  model.token_table = false;
  auto report = make_report(model, 4, 4000, 1);
  report.n_new_ids = 700;
  KvPolicy policy{.profile = KvProfile::kSnapKv, .ratio = 0.15};
  policy.overrides.push_back({.codec = kernels::KvCodec{KvFormat::kToken, KvFormat::kToken}});
  ASSERT_TRUE(validate_policy(policy, model, 4000, nullptr, 700).ok());
  const auto plan = plan_boundary(policy, model, nullptr, report);
  ASSERT_TRUE(plan.ok()) << plan.status().to_string();
  EXPECT_EQ(plan_name(plan->heads[0]), "FULL token");
  EXPECT_EQ(plan_name(plan->heads[2]), "EVICT raw/raw");
  EXPECT_LE(plan_bytes(*plan, model, 4000, tail_length(plan->recent, 4000), nullptr, 700),
            static_cast<std::uint64_t>(0.15 * static_cast<double>(full_bytes(model, 4000))));
  // As many ids as tokens would take the whole of layer 0, more than half of a budget of 15 %.
  policy.ratio = 0.08;
  EXPECT_TRUE(validate_policy(policy, model, 4000, nullptr, 700).ok());
  EXPECT_FALSE(validate_policy(policy, model, 4000, nullptr, 4000).ok());
  EXPECT_FALSE(validate_policy(policy, model, 4000).ok());
}

TEST(PlanSpindle, HeadsThatLoseNothingByAWindowStream) {
  ProfileTable table = mini_table();
  table.heads[6].window64 = 1e-5;   // not more than lloyd4/lloyd4
  table.heads[7].window256 = 1e-5;  // only the longer one is good enough
  table.heads[8].window256 = 1e-3;
  const auto report = make_report(mini_model(), 4, 7800, 1);
  const SequencePlan plan = spindle(0.15, report, &table);
  EXPECT_EQ(plan_name(plan.heads[6]), "STREAM raw/raw 64");
  EXPECT_EQ(plan_name(plan.heads[7]), "STREAM raw/raw 256");
  EXPECT_EQ(plan.heads[8].mode, KvMode::kEvict);
  // The others take what it saves.
  const ProfileTable plain = mini_table();
  EXPECT_GT(plan.heads[8].n_keep, spindle(0.15, report, &plain).heads[8].n_keep);
  // Nobody streams when everything fits.
  EXPECT_EQ(spindle(0.4, report, &table).heads[6].mode, KvMode::kFull);
}

TEST(PlanSpindle, CodebooksWhereTheyBeatTheAlternative) {
  ProfileTable table = mini_table();
  table.heads[2].codebook = 1e-6;
  table.heads[2].codebook_k_entries = 0.1;
  table.heads[2].codebook_v_entries = 0.1;
  table.heads[3].codebook = 1e-6;           // as good, but larger
  table.heads[4].codebook_k_entries = 0.1;  // smaller, but worse
  table.heads[4].codebook_v_entries = 0.1;
  const auto report = make_report(mini_model(), 4, 7800, 1);
  const SequencePlan plan = spindle(0.15, report, &table);
  EXPECT_EQ(plan_name(plan.heads[2]), "EVICT codebook/codebook");
  EXPECT_EQ(plan_name(plan.heads[3]), "EVICT lloyd4/lloyd4");
  EXPECT_EQ(plan_name(plan.heads[4]), "EVICT lloyd4/lloyd4");
  const double budget = 0.15 * static_cast<double>(full_bytes(mini_model(), 7800)) - 2 * 8192;
  EXPECT_LE(static_cast<double>(bytes_of(plan, mini_model(), 7800, &table)), budget);
}

TEST(PlanSpindle, TokensGoWhereTheScoresAre) {
  const ProfileTable table = mini_table();
  auto report = make_report(mini_model(), 4, 4000, 1);
  std::vector<float> high(static_cast<std::size_t>(report.n_candidates), 1.0F);
  std::vector<float> low(static_cast<std::size_t>(report.n_candidates), 1e-12F);
  report.histograms[4] = kernels::score_histogram(high);
  report.histograms[5] = kernels::score_histogram(low);
  const SequencePlan plan = spindle(0.1, report, &table);
  EXPECT_EQ(plan.heads[4].mode, KvMode::kFull);  // every token: no positions
  EXPECT_EQ(plan.heads[5].n_keep, 0);
}

TEST(PlanSpindle, ManyGuardedHeadsYieldWhenTheBudgetIsTooSmall) {
  ProfileTable table = mini_table();
  for (HeadErrors& errors : table.heads) errors.window64 = 1.0;
  table.heads[10].window64 = 9.0;
  const auto report = make_report(mini_model(), 4, 7800, 1);
  const SequencePlan plan = spindle(0.05, report, &table);
  EXPECT_EQ(plan.heads[10].mode, KvMode::kFull);
  int complete = 0;
  for (const HeadPlan& head : plan.heads) complete += head.mode == KvMode::kFull ? 1 : 0;
  EXPECT_GT(complete, 3);
  EXPECT_LT(complete, 24);
}

}  // namespace
}  // namespace spindle::kvstore
