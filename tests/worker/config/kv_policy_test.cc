#include "worker/config/kv_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "worker/config/config_loader.h"
#include "worker/config/config_rules.h"

namespace spindle::config {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using testing::HasSubstr;

// The policy of `kv { policy { TEXT } }`, with defaults.
KvPolicy policy_of(const std::string& text) {
  auto config = parse_config_text("kv { policy { " + text + " } }", "test");
  EXPECT_TRUE(config.ok()) << config.status().to_string();
  fill_defaults(*config);
  return config->kv().policy();
}

TEST(KvPolicyConfig, DefaultsAreThePlanners) {
  const auto policy = to_kv_policy(policy_of(""));
  ASSERT_TRUE(policy.ok()) << policy.status().to_string();
  const kvstore::KvPolicy expected;
  EXPECT_EQ(policy->profile, kvstore::KvProfile::kFull);
  EXPECT_EQ(policy->ratio, 0.0);
  EXPECT_EQ(policy->max_bytes, 0U);
  EXPECT_EQ(policy->sinks, expected.sinks);
  EXPECT_EQ(policy->recent, expected.recent);
  EXPECT_EQ(policy->window, expected.window);
  EXPECT_EQ(policy->lazy_threshold, 0.9);
  EXPECT_EQ(policy->lazy_test, expected.lazy_test);
  EXPECT_TRUE(policy->overrides.empty());
}

TEST(KvPolicyConfig, EveryFieldIsTaken) {
  const auto policy = to_kv_policy(
      policy_of("profile: \"simlayerkv\" ratio: 0.1 sinks: 1 recent: 32 window: 256 "
                "lazy_threshold: 0.8 lazy_test: DECODE "
                "overrides { first_layer: 2 last_layer: 5 kv_head: 1 mode: STREAM window: 64 } "
                "overrides { first_layer: 7 mode: EVICT keep_ratio: 0.25 codec: \"kivi2\" } "
                "overrides { mode: FULL codec: \"token\" }"));
  ASSERT_TRUE(policy.ok()) << policy.status().to_string();
  EXPECT_EQ(policy->profile, kvstore::KvProfile::kSimLayerKv);
  EXPECT_EQ(policy->ratio, 0.1);
  EXPECT_EQ(policy->sinks, 1);
  EXPECT_EQ(policy->recent, 32);
  EXPECT_EQ(policy->window, 256);
  EXPECT_EQ(policy->lazy_threshold, 0.8);
  EXPECT_EQ(policy->lazy_test, kvstore::LazyTest::kDecode);
  ASSERT_EQ(policy->overrides.size(), 3U);
  const kvstore::HeadOverride& stream = policy->overrides[0];
  EXPECT_EQ(stream.first_layer, 2);
  EXPECT_EQ(stream.last_layer, 5);
  EXPECT_EQ(stream.kv_head, 1);
  EXPECT_EQ(stream.mode, kvstore::KvMode::kStream);
  EXPECT_EQ(stream.window, 64);
  EXPECT_FALSE(stream.codec.has_value());
  EXPECT_FALSE(stream.keep_ratio.has_value());
  const kvstore::HeadOverride& evict = policy->overrides[1];
  EXPECT_EQ(evict.first_layer, 7);
  EXPECT_EQ(evict.last_layer, 7);  // one layer
  EXPECT_EQ(evict.kv_head, -1);
  EXPECT_EQ(evict.mode, kvstore::KvMode::kEvict);
  EXPECT_EQ(evict.keep_ratio, 0.25);
  EXPECT_EQ(evict.codec, (KvCodec{KvFormat::kKivi2, KvFormat::kKivi2}));
  EXPECT_EQ(policy->overrides[2].mode, kvstore::KvMode::kFull);

  EXPECT_EQ(to_kv_policy(policy_of("max_bytes: 4096"))->max_bytes, 4096U);
}

TEST(KvPolicyConfig, EveryProfileHasItsName) {
  for (const kvstore::KvProfile profile : kvstore::all_profiles()) {
    const std::string name(kvstore::profile_name(profile));
    const auto policy = to_kv_policy(policy_of("profile: \"" + name + "\""));
    ASSERT_TRUE(policy.ok()) << name;
    EXPECT_EQ(policy->profile, profile);
  }
}

struct Bad {
  const char* text;
  const char* message;
};

class BadPolicies : public testing::TestWithParam<Bad> {};

TEST_P(BadPolicies, NameTheKey) {
  const auto policy = to_kv_policy(policy_of(GetParam().text));
  ASSERT_FALSE(policy.ok());
  EXPECT_EQ(policy.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(policy.status().message(), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadPolicies,
    testing::Values(
        Bad{"profile: \"best\"", "kv.policy.profile must be one of full, spindle"},
        Bad{"profile: \"\"", "kv.policy.profile must be one of"},
        Bad{"ratio: 0", "kv.policy.ratio must be above 0"},
        Bad{"ratio: 1.01", "kv.policy.ratio must be above 0 and at most 1"},
        Bad{"ratio: nan", "kv.policy.ratio must be above 0 and at most 1"},
        Bad{"ratio: 0.5 max_bytes: 5", "kv.policy.ratio and kv.policy.max_bytes are both set"},
        Bad{"lazy_threshold: 0", "kv.policy.lazy_threshold must be above 0"},
        Bad{"lazy_threshold: 1.5", "kv.policy.lazy_threshold must be above 0"},
        Bad{"overrides { } overrides { first_layer: 3 last_layer: 2 }",
            "kv.policy.overrides[1].last_layer is before"},
        Bad{"overrides { keep_ratio: 0 }", "kv.policy.overrides[0].keep_ratio must be above 0"},
        Bad{"overrides { codec: \"int8\" }",
            "kv.policy.overrides[0].codec must be one of raw, int4, kivi4"},
        Bad{"overrides { first_layer: 1 codec: \"token\" }", "token is for layer 0 only"}));

TEST(KvPolicyConfig, Codecs) {
  EXPECT_EQ(kvstore::parse_codec("raw"), KvCodec());
  EXPECT_EQ(kvstore::parse_codec("int4"), (KvCodec{KvFormat::kInt4, KvFormat::kInt4}));
  EXPECT_EQ(kvstore::parse_codec("lloyd4/lloyd4"), (KvCodec{KvFormat::kLloyd4, KvFormat::kLloyd4}));
  EXPECT_EQ(kvstore::parse_codec("lloyd3/lloyd2"), (KvCodec{KvFormat::kLloyd3, KvFormat::kLloyd2}));
  EXPECT_EQ(kvstore::parse_codec("codebook/raw"), (KvCodec{KvFormat::kCodebook, KvFormat::kRaw}));
  EXPECT_EQ(kvstore::parse_codec("token"), (KvCodec{KvFormat::kToken, KvFormat::kToken}));
  for (const char* wrong : {"", "/", "int4/", "/int4", "int4/int4/int4", "INT4", "lloyd5",
                            "token/raw", "raw/token", " int4"}) {
    EXPECT_FALSE(kvstore::parse_codec(wrong).has_value()) << wrong;
  }
}

}  // namespace
}  // namespace spindle::config
