#include "kvstore/plan/kv_plan.h"

#include <gtest/gtest.h>

#include "tests/kvstore/plan/plan_fixture.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;

TEST(KvPlan, ProfileNamesRoundTrip) {
  EXPECT_EQ(all_profiles().size(), 13);
  for (const KvProfile profile : all_profiles()) {
    EXPECT_EQ(parse_profile(profile_name(profile)), profile);
  }
  EXPECT_EQ(profile_name(KvProfile::kSimLayerKvInt4), "simlayerkv-int4");
  EXPECT_EQ(parse_profile("Spindle"), std::nullopt);
  EXPECT_EQ(parse_profile(""), std::nullopt);
}

TEST(KvPlan, PlanNames) {
  EXPECT_EQ(plan_name({}), "FULL raw/raw");
  EXPECT_EQ(plan_name({.mode = KvMode::kEvict, .codec = {KvFormat::kLloyd4, KvFormat::kLloyd2}}),
            "EVICT lloyd4/lloyd2");
  EXPECT_EQ(plan_name({.mode = KvMode::kStream, .window = 256}), "STREAM raw/raw 256");
  EXPECT_EQ(plan_name({.codec = {KvFormat::kToken, KvFormat::kToken}}), "FULL token");
  EXPECT_EQ(plan_name({.codec = {KvFormat::kRaw, KvFormat::kCodebook}}), "FULL raw/codebook");
}

TEST(KvPlan, NeedsOfTheProfiles) {
  const KvModel model = testing::mini_model();
  const auto needs = [&](KvProfile profile) { return boundary_needs({.profile = profile}, model); };
  EXPECT_FALSE(needs(KvProfile::kFull).window_scores);
  EXPECT_FALSE(needs(KvProfile::kInt4).window_scores);
  EXPECT_FALSE(needs(KvProfile::kStreaming).window_scores);
  EXPECT_EQ(needs(KvProfile::kSnapKv).selector, KvSelector::kSnapKvMean);
  EXPECT_TRUE(needs(KvProfile::kSnapKv).window_scores);
  EXPECT_FALSE(needs(KvProfile::kSnapKv).histograms);
  EXPECT_EQ(needs(KvProfile::kKeyDiff).selector, KvSelector::kKeyDiff);
  EXPECT_FALSE(needs(KvProfile::kKeyDiff).window_scores);
  EXPECT_TRUE(needs(KvProfile::kSpindle).histograms);
  EXPECT_TRUE(needs(KvProfile::kDefensive).histograms);
  EXPECT_TRUE(needs(KvProfile::kSimLayerKv).lazy_mass);
  EXPECT_EQ(needs(KvProfile::kSimLayerKv).lazy_window, 1024);
  EXPECT_EQ(boundary_needs({.profile = KvProfile::kSimLayerKv, .window = 256}, model).lazy_window,
            256);
}

TEST(KvPlan, NeedsOfAnOverride) {
  KvPolicy policy{.profile = KvProfile::kInt4};
  policy.overrides.push_back(
      {.first_layer = 3, .last_layer = 4, .selector = KvSelector::kSnapKvMax, .keep_ratio = 0.5});
  const BoundaryNeeds needs = boundary_needs(policy, testing::mini_model());
  EXPECT_EQ(needs.selector, KvSelector::kSnapKvMax);
  EXPECT_TRUE(needs.window_scores);
}

}  // namespace
}  // namespace spindle::kvstore
