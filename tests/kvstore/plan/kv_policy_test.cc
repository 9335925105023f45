#include <gtest/gtest.h>

#include <limits>

#include "tests/kvstore/plan/plan_fixture.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::bytes_of;
using testing::make_report;
using testing::mini_model;

std::string error_of(const KvPolicy& policy, std::int64_t n_tokens = 2000,
                     const KvModel& model = mini_model()) {
  const Status status = validate_policy(policy, model, n_tokens);
  EXPECT_TRUE(status.ok() || status.code() == StatusCode::kInvalidArgument);
  return status.ok() ? "" : status.message();
}

TEST(KvPolicy, EveryProfileIsValidAsItIs) {
  const auto table = testing::mini_table();
  for (const KvProfile profile : all_profiles()) {
    for (const std::int64_t n_tokens : {1, 20, 100, 101, 200, 500, 2000, 7800}) {
      EXPECT_EQ(error_of({.profile = profile}, n_tokens), "") << profile_name(profile);
      const auto report = make_report(mini_model(), 4, std::max<std::int64_t>(n_tokens, 36), 1);
      EXPECT_TRUE(plan_boundary({.profile = profile}, mini_model(), &table, report).ok())
          << profile_name(profile) << " " << n_tokens;
    }
  }
}

TEST(KvPolicy, RangesNameTheField) {
  const KvProfile snap = KvProfile::kSnapKv;
  EXPECT_EQ(error_of({.profile = snap, .ratio = 1.5}),
            "kv_policy.ratio must be in (0, 1], got 1.5");
  EXPECT_NE(error_of({.profile = snap, .ratio = std::numeric_limits<double>::quiet_NaN()}), "");
  EXPECT_NE(error_of({.profile = snap, .ratio = -0.1}), "");
  EXPECT_EQ(error_of({.profile = snap, .ratio = 0.5, .max_bytes = 1}),
            "give either kv_policy.ratio or kv_policy.max_bytes");
  EXPECT_EQ(error_of({.profile = snap, .sinks = 65}), "kv_policy.sinks must be in [0, 64], got 65");
  EXPECT_NE(error_of({.profile = snap, .sinks = -1}), "");
  EXPECT_EQ(error_of({.profile = snap, .recent = 4097}),
            "kv_policy.recent must be in [0, 4096], got 4097");
  EXPECT_EQ(error_of({.profile = KvProfile::kStreaming, .window = -1}),
            "kv_policy.window must be at least 1, got -1");
  EXPECT_EQ(error_of({.profile = KvProfile::kStreaming, .window = 2001}),
            "kv_policy.window must be at most the prompt's 2000 tokens, got 2001");
  EXPECT_EQ(error_of({.profile = snap, .window = 64}),
            "kv_policy.window is for profiles that stream, and snapkv does not");
  EXPECT_EQ(error_of({.profile = KvProfile::kSimLayerKv, .lazy_threshold = 1.5}),
            "kv_policy.lazy_threshold must be in (0, 1], got 1.5");
  EXPECT_EQ(error_of({.profile = KvProfile::kFull, .ratio = 0.5}),
            "kv_policy.ratio must be 1 or unset for profile full, got 0.5");
  EXPECT_EQ(error_of({.profile = KvProfile::kFull, .ratio = 1.0}), "");
}

TEST(KvPolicy, CodedProfilesNeedTheirHeadDim) {
  KvModel model = mini_model();
  model.head_dim = 96;
  EXPECT_EQ(error_of({.profile = KvProfile::kSpindle}, 2000, model),
            "kv_policy.profile spindle needs a head_dim that is a power of two, and this model's "
            "is 96");
  EXPECT_EQ(error_of({.profile = KvProfile::kKivi4}, 2000, model), "");
  EXPECT_EQ(error_of({.profile = KvProfile::kSnapKv}, 2000, model), "");
  model.head_dim = 80;
  EXPECT_NE(error_of({.profile = KvProfile::kKivi4}, 2000, model), "");
  EXPECT_EQ(error_of({.profile = KvProfile::kSnapKv}, 2000, model), "");
  KvPolicy policy{.profile = KvProfile::kSnapKv};
  policy.overrides.push_back({.codec = KvCodec{KvFormat::kRaw, KvFormat::kKivi2}});
  EXPECT_EQ(
      error_of(policy, 2000, model),
      "kv_policy.overrides[0].codec kivi2 needs a head_dim that is a multiple of 32, and this "
      "model's is 80");
}

TEST(KvPolicy, OverridesNameTheirField) {
  const auto with = [](const HeadOverride& range, KvProfile profile = KvProfile::kSnapKv) {
    KvPolicy policy{.profile = profile};
    policy.overrides.push_back(range);
    return error_of(policy);
  };
  EXPECT_EQ(with({.first_layer = 0, .last_layer = 11, .mode = KvMode::kFull}), "");
  EXPECT_EQ(with({.first_layer = 2, .last_layer = 12}),
            "kv_policy.overrides[0].last_layer must end a range of the model's layers 0 to 11");
  EXPECT_NE(with({.first_layer = 3, .last_layer = 2}), "");
  EXPECT_NE(with({.kv_head = 2}), "");
  EXPECT_NE(with({.keep_ratio = 0.0}), "");
  EXPECT_NE(with({.mode = KvMode::kFull, .keep_ratio = 0.5}), "");
  EXPECT_NE(with({.mode = KvMode::kEvict}), "");
  EXPECT_NE(with({.mode = KvMode::kEvict, .window = 64}), "");
  EXPECT_NE(with({.window = 0}), "");
  EXPECT_NE(with({.keep_ratio = 0.5, .window = 64}), "");
  EXPECT_NE(with({.codec = KvCodec{KvFormat::kToken, KvFormat::kRaw}}), "");
  EXPECT_NE(with({.last_layer = 1, .codec = KvCodec{KvFormat::kToken, KvFormat::kToken}}), "");
  EXPECT_EQ(with({.codec = KvCodec{KvFormat::kToken, KvFormat::kToken}}), "");
  KvModel without_table = mini_model();
  without_table.token_table = false;
  KvPolicy tokens{.profile = KvProfile::kSnapKv};
  tokens.overrides.push_back({.codec = KvCodec{KvFormat::kToken, KvFormat::kToken}});
  EXPECT_EQ(error_of(tokens, 2000, without_table), "");
  EXPECT_EQ(with({.keep_ratio = 0.5}, KvProfile::kInt4),
            "kv_policy.overrides[0].selector must be set: profile int4 scores no tokens");
  // One selector: for all heads or for none.
  EXPECT_NE(with({.selector = KvSelector::kSnapKvMax}), "");
  EXPECT_EQ(with({.last_layer = 11, .selector = KvSelector::kSnapKvMax}), "");
  EXPECT_NE(with({.last_layer = 11, .selector = KvSelector::kSnapKvMax}, KvProfile::kDefensive),
            "");
}

// The named floor is accepted by the check and by the planner, one step less by neither.
TEST(KvPolicy, FloorsAreNamedAndTight) {
  const KvModel model = mini_model();
  const auto table = testing::mini_table();
  for (const KvProfile profile : all_profiles()) {
    if (profile == KvProfile::kFull) continue;
    for (const std::int64_t n_tokens : {1100, 2000, 7800}) {
      KvPolicy policy{.profile = profile, .ratio = 1e-6};
      const auto report = make_report(model, 4, n_tokens, 7);
      const Status status = validate_policy(policy, model, n_tokens, &table);
      ASSERT_FALSE(status.ok());
      EXPECT_EQ(plan_boundary(policy, model, &table, report).status(), status);
      const std::string text = "at least ";
      const auto at = status.message().find(text);
      ASSERT_NE(at, std::string::npos) << status.message();
      const double floor = std::stod(status.message().substr(at + text.size()));
      ASSERT_GT(floor, 0.0) << status.message();
      policy.ratio = floor;
      EXPECT_TRUE(validate_policy(policy, model, n_tokens, &table).ok()) << status.message();
      EXPECT_TRUE(plan_boundary(policy, model, &table, report).ok()) << status.message();
      policy.ratio = floor - 1e-4;
      EXPECT_FALSE(validate_policy(policy, model, n_tokens, &table).ok()) << status.message();
      EXPECT_FALSE(plan_boundary(policy, model, &table, report).ok()) << status.message();
    }
  }
}

TEST(KvPolicy, FloorsInBytes) {
  const std::string message = error_of({.profile = KvProfile::kInt4, .max_bytes = 1000});
  // 24 heads of 4 raw sinks and 63 blocks of 2304 (1996 tokens), and two pages.
  const std::uint64_t floor = 24 * (1024 + 63 * 2304) + 2 * 8192;
  EXPECT_EQ(message, "kv_policy.max_bytes is too small: profile int4 needs at least " +
                         std::to_string(floor) + " for 2000 tokens, got 1000");
  EXPECT_EQ(error_of({.profile = KvProfile::kInt4, .max_bytes = floor}), "");
}

TEST(KvPolicy, ShortPromptsHaveAnyRatioButNotAnyBytes) {
  EXPECT_EQ(error_of({.profile = KvProfile::kSpindle, .ratio = 0.01}, 100), "");
  EXPECT_NE(error_of({.profile = KvProfile::kSpindle, .ratio = 0.01}, 101), "");
  EXPECT_NE(error_of({.profile = KvProfile::kSpindle, .max_bytes = 1000}, 100), "");
  EXPECT_EQ(error_of({.profile = KvProfile::kSpindle, .ratio = 0.01, .best_effort = true}, 101),
            "");
}

}  // namespace
}  // namespace spindle::kvstore
