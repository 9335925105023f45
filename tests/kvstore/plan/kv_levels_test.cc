#include "kvstore/plan/kv_levels.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/kvstore/plan/plan_fixture.h"

namespace spindle::kvstore {
namespace {

using testing::bytes_of;
using testing::make_report;
using testing::mini_model;
using testing::mini_table;

using Levels = std::vector<LayerRatio>;

SequencePlan levelled(const KvPolicy& policy, const BoundaryReport& report, const Levels& levels,
                      const ProfileTable* table) {
  auto plan = plan_boundary(policy, mini_model(), table, report, levels);
  EXPECT_TRUE(plan.ok()) << plan.status().to_string();
  return plan.ok() ? *plan : SequencePlan{};
}

// What a level means for all layers at once.
SequencePlan soft_plan(KvPolicy policy, double ratio, const BoundaryReport& report,
                       const ProfileTable* table) {
  policy.ratio = ratio;
  policy.max_bytes = 0;
  policy.best_effort = true;
  auto plan = plan_boundary(policy, mini_model(), table, report);
  EXPECT_TRUE(plan.ok()) << plan.status().to_string();
  return plan.ok() ? *plan : SequencePlan{};
}

std::uint64_t range_bytes(const SequencePlan& plan, int recent, int first_layer, int n_layers,
                          std::int64_t n_tokens, const ProfileTable* table) {
  const KvModel model = mini_model();
  std::uint64_t bytes = 0;
  for (int i = first_layer * 2; i < (first_layer + n_layers) * 2; ++i) {
    const auto head = static_cast<std::size_t>(i);
    bytes +=
        head_bytes(plan.heads[head], model, plan.sinks, n_tokens, tail_length(recent, n_tokens),
                   table == nullptr ? nullptr : &table->heads[head]);
  }
  return bytes;
}

TEST(KvLevels, NoLevelsAndOwnLevelsAreThePolicysPlan) {
  const ProfileTable table = mini_table();
  const auto report = make_report(mini_model(), 4, 3000, 5);
  for (const KvProfile profile : all_profiles()) {
    SCOPED_TRACE(std::string(profile_name(profile)));
    const KvPolicy policy{.profile = profile};
    const auto own = plan_boundary(policy, mini_model(), &table, report);
    ASSERT_TRUE(own.ok());
    EXPECT_EQ(levelled(policy, report, {}, &table), *own);
    EXPECT_EQ(levelled(policy, report, {{0, 5, 0}, {5, 7, 0}}, &table), *own);
  }
}

TEST(KvLevels, EqualRatiosAreOnePlan) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  const ProfileTable table = mini_table();
  const auto report = make_report(mini_model(), 4, 3000, seed);
  for (const KvProfile profile : all_profiles()) {
    for (const double ratio : {0.4, 0.12, 0.05}) {
      SCOPED_TRACE(std::string(profile_name(profile)) + " " + std::to_string(ratio));
      const KvPolicy policy{.profile = profile};
      EXPECT_EQ(levelled(policy, report, {{0, 3, ratio}, {3, 8, ratio}, {11, 1, ratio}}, &table),
                soft_plan(policy, ratio, report, &table));
    }
  }
}

TEST(KvLevels, EveryRangeTakesItsHeadsFromThePlanOfItsRatio) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  const ProfileTable table = mini_table();
  bool shortened = false;
  for (const std::int64_t n_tokens : {600, 3008, 7800}) {
    const auto report = make_report(mini_model(), 4, n_tokens, seed);
    for (const KvProfile profile : all_profiles()) {
      const KvPolicy policy{.profile = profile};
      const Levels levels = {{0, 2, 0.6}, {2, 5, 0.06}, {7, 3, 0}, {10, 2, 0.25}};
      const SequencePlan plan = levelled(policy, report, levels, &table);
      EXPECT_EQ(plan, levelled(policy, report, levels, &table));
      for (const LayerRatio& level : levels) {
        SCOPED_TRACE(std::string(profile_name(profile)) + " " + std::to_string(level.ratio));
        const SequencePlan alone = levelled(policy, report, {{0, 12, level.ratio}}, &table);
        EXPECT_LE(plan.recent, alone.recent);
        shortened |= plan.recent < alone.recent;
        for (int i = level.first_layer * 2; i < (level.first_layer + level.n_layers) * 2; ++i) {
          const auto head = static_cast<std::size_t>(i);
          HeadPlan expected = alone.heads[head];
          // Only what positions cost in a shorter tail.
          EXPECT_LE(plan.heads[head].n_keep, expected.n_keep);
          EXPECT_GE(plan.heads[head].n_keep, expected.n_keep - 32);
          if (plan.recent == alone.recent) {
            EXPECT_EQ(plan.heads[head].n_keep, expected.n_keep);
          }
          expected.n_keep = plan.heads[head].n_keep;
          EXPECT_EQ(plan.heads[head], expected);
        }
        EXPECT_LE(
            range_bytes(plan, plan.recent, level.first_layer, level.n_layers, n_tokens, &table),
            range_bytes(alone, alone.recent, level.first_layer, level.n_layers, n_tokens, &table));
      }
    }
  }
  EXPECT_TRUE(shortened);
}

TEST(KvLevels, AShorterTailIsPaidForByHand) {
  // Raw heads at 50 % have a tail of 64; at 10 % none. 2,016 tokens: 96 of them in pages before.
  const auto report = make_report(mini_model(), 4, 2016, 5);
  const KvPolicy policy{.profile = KvProfile::kSnapKv};
  const SequencePlan half = soft_plan(policy, 0.5, report, nullptr);
  ASSERT_EQ(half.recent, 64);
  const SequencePlan plan = levelled(policy, report, {{0, 6, 0.5}, {6, 6, 0.1}}, nullptr);
  EXPECT_EQ(plan.recent, 0);
  // 64 tokens in two pages, of which 32 are the window, are 32 in a block with positions now, and
  // nothing has to go.
  EXPECT_EQ(plan.heads[0].n_keep, half.heads[0].n_keep);
  // With a tail of one page, the window moves into a block with 64 bytes of positions: up to four
  // tokens go.
  const KvPolicy paged{.profile = KvProfile::kSnapKv, .recent = 32};
  const SequencePlan one_page = soft_plan(paged, 0.5, report, nullptr);
  ASSERT_EQ(one_page.recent, 32);
  const SequencePlan shorter = levelled(paged, report, {{0, 6, 0.5}, {6, 6, 0.1}}, nullptr);
  EXPECT_EQ(shorter.recent, 0);
  EXPECT_LT(shorter.heads[0].n_keep, one_page.heads[0].n_keep);
  EXPECT_GE(shorter.heads[0].n_keep, one_page.heads[0].n_keep - 4);
}

TEST(KvLevels, OutOfReachIsTheSmallestPlan) {
  const ProfileTable table = mini_table();
  const auto report = make_report(mini_model(), 4, 2000, 5);
  for (const KvProfile profile : all_profiles()) {
    SCOPED_TRACE(std::string(profile_name(profile)));
    const KvPolicy policy{.profile = profile};
    const SequencePlan own = *plan_boundary(policy, mini_model(), &table, report);
    const SequencePlan plan = levelled(policy, report, {{0, 12, 1e-9}}, &table);
    EXPECT_LE(bytes_of(plan, mini_model(), 2000, &table),
              bytes_of(own, mini_model(), 2000, &table));
  }
}

// A soft size is that of 128 tokens at least; what is stronger than the policy's own still is.
TEST(KvLevels, StrongerIsSmallerForShortPrompts) {
  const ProfileTable table = mini_table();
  const auto report = make_report(mini_model(), 4, 300, 5);
  const KvPolicy policy{.profile = KvProfile::kSpindle};
  const auto bytes = [&](double ratio) {
    return bytes_of(levelled(policy, report, {{0, 12, ratio}}, &table), mini_model(), 300, &table);
  };
  EXPECT_EQ(bytes(0.1), bytes(0));
  const double own = static_cast<double>(full_bytes(mini_model(), 128));
  EXPECT_LE(static_cast<double>(bytes(0.1)), own);
  EXPECT_GT(static_cast<double>(bytes(0.1)), 0.9 * own);
  EXPECT_LE(static_cast<double>(bytes(0.07)), 0.7 * own);
  EXPECT_GT(static_cast<double>(bytes(0.07)), 0.6 * own);
}

TEST(KvLevels, ASizeAskedForStaysTheMost) {
  const ProfileTable table = mini_table();
  const KvModel model = mini_model();
  const auto report = make_report(model, 4, 2000, 5);
  const KvPolicy asked{.profile = KvProfile::kSpindle, .ratio = 0.1};
  EXPECT_EQ(levelled(asked, report, {{0, 12, 0.3}}, &table),
            *plan_boundary(asked, model, &table, report));
  KvPolicy soft = asked;
  soft.best_effort = true;
  EXPECT_GT(bytes_of(levelled(soft, report, {{0, 12, 0.3}}, &table), model, 2000, &table),
            full_bytes(model, 2000) / 4);
  // And is refused where it was.
  const KvPolicy tiny{.profile = KvProfile::kSpindle, .max_bytes = 1000};
  EXPECT_EQ(
      plan_boundary(tiny, model, &table, report, Levels{{0, 6, 0.1}, {6, 6, 0}}).status().code(),
      StatusCode::kInvalidArgument);
}

TEST(KvLevels, LaterBoundariesKeepWhatEachRangesShareAllows) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  for (const KvProfile profile : all_profiles()) {
    SCOPED_TRACE(std::string(profile_name(profile)));
    const KvPolicy policy{.profile = profile};
    const Levels levels = {{0, 6, 0.2}, {6, 6, 0.08}};
    const SequencePlan first = levelled(policy, make_report(model, 4, 4000, seed), levels, &table);
    if (is_uncompressed(first)) continue;
    const std::int64_t n_new = 3000 + tail_length(first.recent, 4000);
    BoundaryReport report = make_report(model, 0, n_new, seed + 1);
    report.n_tokens = 7000;
    report.earlier = &first;
    const SequencePlan later = levelled(policy, report, levels, &table);
    EXPECT_EQ(later.recent, first.recent);
    EXPECT_EQ(later, levelled(policy, report, levels, &table));
    // No weaker figure for a stronger level, head by head.
    const SequencePlan stronger = levelled(policy, report, {{0, 6, 0.2}, {6, 6, 0.04}}, &table);
    std::int64_t kept[2] = {};
    std::int64_t evicting[2] = {};
    for (std::size_t i = 0; i < later.heads.size(); ++i) {
      HeadPlan same = later.heads[i];
      same.n_keep = first.heads[i].n_keep;
      EXPECT_EQ(same, first.heads[i]);
      EXPECT_LE(stronger.heads[i].n_keep, later.heads[i].n_keep);
      if (later.heads[i].mode != KvMode::kEvict) continue;
      kept[i / 12] += later.heads[i].n_keep;
      ++evicting[i / 12];
    }
    if (evicting[0] > 0 && evicting[1] > 0 && profile != KvProfile::kPyramidKv &&
        profile != KvProfile::kSpindleKv) {  // those keep fewer in later layers anyway
      EXPECT_GT(static_cast<double>(kept[0]) / static_cast<double>(evicting[0]),
                1.3 * static_cast<double>(kept[1]) / static_cast<double>(evicting[1]));
    }
  }
}

// Layers that keep everything must not eat the share of those that evict.
TEST(KvLevels, LaterBoundariesOfStrongRangesDoNotPayForLightOnes) {
  const KvModel model = mini_model();
  const KvPolicy policy{.profile = KvProfile::kDefensive};
  const Levels levels = {{0, 8, 0.6}, {8, 4, 0.1}};
  const SequencePlan first = levelled(policy, make_report(model, 4, 4000, 3), levels, nullptr);
  ASSERT_EQ(plan_name(first.heads[0]), "FULL int4/int4");
  ASSERT_EQ(plan_name(first.heads[20]), "EVICT int4/int4");
  BoundaryReport report = make_report(model, 0, 3000 + tail_length(first.recent, 4000), 4);
  report.n_tokens = 7000;
  report.earlier = &first;
  const SequencePlan later = levelled(policy, report, levels, nullptr);
  std::uint64_t bytes = 0;
  for (std::size_t i = 16; i < 24; ++i) {
    bytes += head_block_bytes(later.heads[i], model, later.heads[i].n_keep);
  }
  const auto share = 0.1 * static_cast<double>(full_bytes(model, 3000)) / 3;
  // These layers' scores are their own, so their part of one threshold is about the share.
  EXPECT_GT(static_cast<double>(bytes), 0.7 * share);
  EXPECT_LT(static_cast<double>(bytes), 1.3 * share);
}

TEST(KvLevels, RangesThatDoNotCoverTheModelAreErrors) {
  const auto report = make_report(mini_model(), 4, 2000, 5);
  const KvPolicy policy{.profile = KvProfile::kSnapKv};
  const std::vector<Levels> wrong = {
      {{0, 11, 0.1}},
      {{0, 13, 0.1}},
      {{1, 11, 0.1}},
      {{0, 6, 0.1}, {7, 5, 0.1}},
      {{0, 7, 0.1}, {6, 6, 0.1}},
      {{0, 12, 0.1}, {12, 0, 0.1}},
      {{0, 12, -0.1}},
      {{0, 12, std::nan("")}},
      {{0, 12, HUGE_VAL}},
      {{0, 6, 0.1}, {6, 2147483647, 0.1}},
  };
  for (const Levels& levels : wrong) {
    EXPECT_EQ(plan_boundary(policy, mini_model(), nullptr, report, levels).status().code(),
              StatusCode::kInternal);
  }
}

}  // namespace
}  // namespace spindle::kvstore
