#include "kvstore/plan/level_curves.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>

#include "kvstore/plan/plan_frame.h"
#include "tests/kvstore/plan/plan_fixture.h"
#include "tests/source_dir.h"
#include "worker/config/profile_table.h"

namespace spindle::kvstore {
namespace {

using testing::mini_model;
using testing::mini_table;

constexpr std::int64_t kPrompt = 4000;

ProfileTable bundled_table() {
  auto table = config::load_profile_table(
      std::filesystem::path(source_dir()) / "configs/profiles/spindle-mini.pbtxt", 12, 2);
  EXPECT_TRUE(table.ok()) << table.status().to_string();
  return table.ok() ? *table : mini_table();
}

LevelLadder ladder_of(const KvPolicy& policy, const ProfileTable* table,
                      std::int64_t n_tokens = kPrompt, const LadderShape& shape = {}) {
  auto ladder = level_ladder(policy, mini_model(), table, n_tokens, shape);
  EXPECT_TRUE(ladder.ok()) << ladder.status().to_string();
  return ladder.ok() ? *ladder : LevelLadder{{1.0}, 0};
}

TEST(LevelLadder, RatiosAroundThePolicysOwn) {
  const ProfileTable table = bundled_table();
  const LevelLadder ladder = ladder_of({.profile = KvProfile::kSpindle}, &table);
  ASSERT_EQ(ladder.size(), 68u);
  EXPECT_EQ(ladder.own, 20u);
  EXPECT_EQ(ladder.ratios[20], 0.10);
  for (std::size_t i = 0; i < ladder.size(); ++i) {
    EXPECT_NEAR(ladder.ratios[i], 0.10 * std::pow(0.97, static_cast<double>(i) - 20), 1e-12);
    EXPECT_NEAR(ladder.factor(i), ladder.ratios[i] / 0.10, 1e-12);
  }
}

TEST(LevelLadder, StaysBetweenTheFloorAndEverything) {
  const KvModel model = mini_model();
  const ProfileTable table = mini_table();
  for (const KvProfile profile : all_profiles()) {
    for (const std::int64_t n_tokens : {50, 110, 300, 4000}) {
      SCOPED_TRACE(std::string(profile_name(profile)) + " " + std::to_string(n_tokens));
      const KvPolicy policy{.profile = profile};
      const LevelLadder ladder = ladder_of(policy, &table, n_tokens, {0.5, 6, 20});
      ASSERT_LT(ladder.own, ladder.size());
      const auto full = static_cast<double>(full_bytes(model, n_tokens));
      const double most =
          static_cast<double>(plan_bytes(uncompressed_plan(policy, model), model, n_tokens, 0)) /
          full;
      const std::uint64_t floor = floor_bytes(policy, model, &table, n_tokens, -1);
      const auto bytes = [&](std::size_t level) {
        return level_size(policy, model, &table, n_tokens, ladder.ratios[level]).bytes;
      };
      EXPECT_LE(ladder.ratios.front(), most);
      EXPECT_GE(bytes(ladder.size() - 1) + 1, std::min(floor, bytes(ladder.own)));
      for (std::size_t i = 1; i < ladder.size(); ++i) {
        EXPECT_LT(ladder.ratios[i], 0.96 * ladder.ratios[i - 1]);
        EXPECT_GE(ladder.ratios[i], 0.4999 * ladder.ratios[i - 1]);
      }
      const PlanSize own = plan_size(policy, model, &table, n_tokens);
      if (own.limited) {
        EXPECT_EQ(ladder.ratios[ladder.own], std::min(own.ratio, most));
      }
      // Twenty halvings reach any floor.
      if (profile == KvProfile::kSnapKv && n_tokens == 4000) {
        EXPECT_NEAR(static_cast<double>(bytes(ladder.size() - 1)), static_cast<double>(floor), 1);
        EXPECT_EQ(ladder.ratios.front(), most);
      }
    }
  }
}

// However fine the steps are; what is left of one at the end is a step of its own from a fifth on.
TEST(LevelLadder, FineStepsReachTheFloor) {
  const KvPolicy policy{.profile = KvProfile::kSnapKv};
  const LevelLadder coarse = ladder_of(policy, nullptr, kPrompt, {0.5, 0, 20});
  const double floor = coarse.ratios.back();
  for (const double step : {0.9, 0.97, 0.99}) {
    SCOPED_TRACE(step);
    const LevelLadder ladder = ladder_of(policy, nullptr, kPrompt, {step, 0, 500});
    const double steps = std::log(floor / ladder.ratios.front()) / std::log(step);
    const double rest = steps - std::floor(steps);
    EXPECT_EQ(ladder.size(), 1 + static_cast<std::size_t>(steps) + (rest >= 0.2 ? 1 : 0));
    EXPECT_NEAR(ladder.ratios.back(),
                rest >= 0.2 ? floor : ladder.ratios.front() * std::pow(step, std::floor(steps)),
                1e-9);
  }
}

TEST(LevelLadder, ASizeAskedForIsTheLightest) {
  KvPolicy policy{.profile = KvProfile::kSnapKv, .ratio = 0.2};
  EXPECT_EQ(ladder_of(policy, nullptr).own, 0u);
  policy.best_effort = true;
  EXPECT_EQ(ladder_of(policy, nullptr).own, 20u);
  policy = {.profile = KvProfile::kSnapKv, .max_bytes = 3'000'000};
  EXPECT_NEAR(ladder_of(policy, nullptr).ratios.front(),
              3e6 / static_cast<double>(full_bytes(mini_model(), kPrompt)), 1e-12);
  // No level is far enough from a profile that keeps everything.
  EXPECT_EQ(ladder_of({.profile = KvProfile::kFull}, nullptr).size(), 1u);
}

TEST(LevelLadder, ShapesOutOfRangeAreRefused) {
  const KvPolicy policy{.profile = KvProfile::kSnapKv};
  for (const LadderShape& shape :
       {LadderShape{.step = 0}, LadderShape{.step = 1}, LadderShape{.step = std::nan("")},
        LadderShape{.n_lighter = -1}, LadderShape{.n_stronger = -1}}) {
    EXPECT_EQ(level_ladder(policy, mini_model(), nullptr, kPrompt, shape).status().code(),
              StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(level_ladder(policy, mini_model(), nullptr, 0, {}).ok());
  ProfileTable other = mini_table();
  other.heads.pop_back();
  EXPECT_FALSE(level_ladder(policy, mini_model(), &other, kPrompt, {}).ok());
}

TEST(LevelLadder, OtherPoliciesTakeTheSameFactor) {
  const ProfileTable table = mini_table();
  const LevelLadder ladder = ladder_of({.profile = KvProfile::kSpindle}, &table);
  const auto ratio = [&](std::size_t level, const KvPolicy& policy) {
    return *level_ratio(ladder, level, policy, mini_model(), &table, kPrompt);
  };
  EXPECT_EQ(ratio(ladder.own, {.profile = KvProfile::kSnapKv}), 0.0);
  EXPECT_NEAR(ratio(ladder.own + 1, {.profile = KvProfile::kSnapKv}), 0.25 * 0.97, 1e-12);
  EXPECT_NEAR(ratio(ladder.own + 2, {.profile = KvProfile::kSnapKv, .ratio = 0.4}),
              0.4 * 0.97 * 0.97, 1e-12);
  // 72 bytes of 256 and the tail.
  EXPECT_NEAR(ratio(ladder.own + 1, {.profile = KvProfile::kInt4}), 0.295 * 0.97, 0.01);
  EXPECT_FALSE(level_ratio(ladder, ladder.size(), {}, mini_model(), &table, kPrompt).ok());
}

TEST(LevelCurves, StrongerTakesNoMoreAndLosesNoLess) {
  const ProfileTable bundled = bundled_table();
  const std::vector<LayerSpan> spans = {{0, 3}, {3, 3}, {6, 3}, {9, 3}};
  for (const KvProfile profile : all_profiles()) {
    for (const ProfileTable* table : {&bundled, static_cast<const ProfileTable*>(nullptr)}) {
      for (const std::int64_t n_tokens : {60, 200, 1000, 8000}) {
        SCOPED_TRACE(std::string(profile_name(profile)) + " " + std::to_string(n_tokens) +
                     (table != nullptr ? " calibrated" : ""));
        const KvPolicy policy{.profile = profile};
        const LevelLadder ladder = ladder_of(policy, table, n_tokens);
        const auto curves = level_curves(policy, mini_model(), table, n_tokens, ladder, spans);
        ASSERT_TRUE(curves.ok()) << curves.status().to_string();
        ASSERT_EQ(curves->size(), spans.size());
        for (const LevelCurve& curve : *curves) {
          ASSERT_EQ(curve.size(), ladder.size());
          for (std::size_t i = 0; i < curve.size(); ++i) {
            EXPECT_GT(curve[i].bytes, 0u);
            EXPECT_TRUE(std::isfinite(curve[i].error));
            EXPECT_GE(curve[i].error, 0);
            if (i == 0) continue;
            EXPECT_LE(curve[i].bytes, curve[i - 1].bytes);
            EXPECT_GE(curve[i].error, curve[i - 1].error);
          }
        }
      }
    }
  }
}

// All stages together take what the ratio says, and the retrieval head's stage loses most.
TEST(LevelCurves, FollowTheLadderOfTheBundledModel) {
  const ProfileTable table = bundled_table();
  const KvPolicy policy{.profile = KvProfile::kSpindle};
  const LevelLadder ladder = ladder_of(policy, &table);
  const std::vector<LayerSpan> spans = {{0, 3}, {3, 3}, {6, 3}, {9, 3}};
  const auto begin = std::chrono::steady_clock::now();
  const auto curves = level_curves(policy, mini_model(), &table, kPrompt, ladder, spans);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
  RecordProperty("ms_for_all_steps", std::to_string(took.count()));
  ASSERT_TRUE(curves.ok());
  const auto full = static_cast<double>(full_bytes(mini_model(), kPrompt));
  for (std::size_t level = 0; level < ladder.size(); ++level) {
    double bytes = 0;
    for (const LevelCurve& curve : *curves) bytes += static_cast<double>(curve[level].bytes);
    // Around a twentieth plans give some stage more than lighter ones do, so that
    // what the curves say there is a mean.
    const double ratio = ladder.ratios[level];
    const bool in_order = ratio > 0.056 || ratio < 0.045;
    EXPECT_LE(bytes, (in_order ? 1.0 : 1.11) * ratio * full) << ratio;
    EXPECT_GE(bytes, (in_order ? 0.93 : 0.87) * ratio * full) << ratio;
    if (level <= ladder.own) continue;
    for (std::size_t s = 0; s < 4; ++s) {
      EXPECT_LT((*curves)[s][level].bytes, (*curves)[s][ladder.own].bytes) << s;
      EXPECT_GT((*curves)[s][level].error, (*curves)[s][ladder.own].error) << s;
    }
  }
}

TEST(LevelCurves, ErrorsOfHeads) {
  const HeadErrors errors{.k_bits = {8, 4, 2, 1},
                          .v_bits = {0.8, 0.4, 0.2, 0.1},
                          .int4 = 3,
                          .codebook = 5,
                          .window64 = 10,
                          .window256 = 6};
  const auto error = [&](const HeadPlan& plan, std::int64_t n = 4096) {
    return head_error(plan, n, &errors);
  };
  using kernels::KvFormat;
  EXPECT_EQ(error({}), 0);
  EXPECT_EQ(error({.codec = {KvFormat::kToken, KvFormat::kToken}}), 0);
  EXPECT_EQ(error({.codec = {KvFormat::kLloyd3, KvFormat::kLloyd2}}), 2.4);
  EXPECT_EQ(error({.codec = {KvFormat::kRaw, KvFormat::kLloyd4}}), 0.1);
  EXPECT_EQ(error({.codec = {KvFormat::kInt4, KvFormat::kInt4}}), 3);
  EXPECT_EQ(error({.codec = {KvFormat::kCodebook, KvFormat::kCodebook}}), 5);
  const auto stream = [](std::int64_t window) {
    return HeadPlan{.mode = KvMode::kStream, .window = window};
  };
  EXPECT_EQ(error(stream(64)), 10);
  EXPECT_EQ(error(stream(128)), 8);
  EXPECT_EQ(error(stream(256)), 6);
  EXPECT_EQ(error(stream(1024)), 3);  // half way from 2^8 to 2^12
  EXPECT_EQ(error(stream(4096)), 0);
  EXPECT_EQ(error(stream(32)), 20);
  // A selector does no worse than the newest tokens.
  EXPECT_EQ(error({.mode = KvMode::kEvict, .n_keep = 1024 - 32}), 3);
  EXPECT_EQ(error({.mode = KvMode::kEvict,
                   .codec = {KvFormat::kInt4, KvFormat::kInt4},
                   .n_keep = 1024 - 32}),
            6);
  double before = HUGE_VAL;
  for (std::int64_t kept = 0; kept < 4000; kept += 7) {
    const double now = error({.mode = KvMode::kEvict, .n_keep = kept});
    EXPECT_LE(now, before);
    before = now;
  }
  // Figures that are none do not spread.
  const HeadErrors broken{.k_bits = {NAN, NAN, NAN, NAN}, .window64 = -1, .window256 = NAN};
  EXPECT_EQ(head_error({.codec = {KvFormat::kLloyd1, KvFormat::kRaw}}, 4096, &broken), 1e9);
  EXPECT_EQ(head_error(stream(100), 4096, &broken), 0);
  // Uncalibrated heads are ordered too.
  EXPECT_LT(head_error({.codec = {KvFormat::kLloyd4, KvFormat::kLloyd4}}, 4096, nullptr),
            head_error({.codec = {KvFormat::kLloyd3, KvFormat::kLloyd2}}, 4096, nullptr));
}

TEST(LevelCurves, SpansOutsideTheModelAreErrors) {
  const KvPolicy policy{.profile = KvProfile::kSnapKv};
  const LevelLadder ladder = ladder_of(policy, nullptr);
  for (const LayerSpan& span : {LayerSpan{-1, 2}, LayerSpan{0, 13}, LayerSpan{12, 1},
                                LayerSpan{3, 0}, LayerSpan{1, 2147483647}}) {
    EXPECT_EQ(level_curves(policy, mini_model(), nullptr, kPrompt, ladder, std::span(&span, 1))
                  .status()
                  .code(),
              StatusCode::kInternal);
  }
}

}  // namespace
}  // namespace spindle::kvstore
