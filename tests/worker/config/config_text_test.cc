#include "worker/config/config_text.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "worker/config/config_loader.h"
#include "worker/config/config_rules.h"

namespace spindle::config {
namespace {

using google::protobuf::util::MessageDifferencer;
using testing::HasSubstr;
using testing::Not;

Config some_config() {
  Config config;
  config.mutable_model()->set_path("/data/some \"model\"");
  config.mutable_cluster()->add_layers_per_stage(5);
  config.mutable_cluster()->add_layers_per_stage(7);
  config.mutable_kv()->set_dtype(Kv::BF16);
  config.mutable_kv()->mutable_policy()->add_overrides()->set_codec("int4");
  config.mutable_kv()->mutable_policy()->add_overrides()->set_mode(KvOverride::STREAM);
  fill_defaults(config);
  return config;
}

TEST(ConfigText, PrintedTextReadsBackTheSame) {
  const Config config = some_config();
  const auto again = parse_config_text(effective_config_text(config), "printed");
  ASSERT_TRUE(again.ok()) << again.status().to_string();
  EXPECT_TRUE(MessageDifferencer::Equals(config, *again));
}

TEST(ConfigText, NamesWhatIsDecidedLater) {
  const std::string text = effective_config_text(some_config());
  EXPECT_THAT(text, HasSubstr("# kv.memory_bytes: decided at start\n"));
  EXPECT_THAT(text, HasSubstr("# cluster.device_memory_bytes: what the device has\n"));
  EXPECT_THAT(text, HasSubstr("# api.api_key: none"));
  EXPECT_THAT(text, HasSubstr("# kv.policy.ratio: none, the profile's own size\n"));
  EXPECT_THAT(text, HasSubstr("# kv.max_session_bytes: decided at start\n"));
  EXPECT_THAT(text, Not(HasSubstr("# cluster.layers_per_stage")));
}

TEST(ConfigText, NeverShowsAKey) {
  Config config = some_config();
  config.mutable_api()->add_api_key("sk-secret-1");
  config.mutable_api()->add_api_key("sk-secret-2");
  for (const std::string& text : {effective_config_text(config), comparison_text(config)}) {
    EXPECT_THAT(text, HasSubstr("api_key"));
    EXPECT_THAT(text, Not(HasSubstr("secret")));
  }
  // A printed configuration cannot be served with: the placeholder is not a key.
  const auto again = parse_config_text(effective_config_text(config), "printed");
  ASSERT_TRUE(again.ok());
  EXPECT_THAT(validate_config(*again).message(), HasSubstr("placeholder"));
}

TEST(ConfigText, ComparisonHasOneLinePerField) {
  const std::string text = comparison_text(some_config());
  EXPECT_THAT(text, HasSubstr("cluster.layers_per_stage = 5,7\n"));
  EXPECT_THAT(text, HasSubstr("kv.dtype = BF16\n"));
  EXPECT_THAT(text, HasSubstr("kv.policy.overrides = "
                              "{ first_layer: 0 kv_head: -1 codec: \"int4\" },"
                              "{ first_layer: 0 kv_head: -1 mode: STREAM }\n"));
  EXPECT_THAT(text, HasSubstr("api.http.port = 8000\n"));
  EXPECT_THAT(text, HasSubstr("model.path = \"/data/some \\\"model\\\"\"\n"));
}

TEST(ConfigText, ComparisonLinesOfTwoConfigsAreAboutTheSameFields) {
  const auto lines = [](const Config& config) {
    std::vector<std::string> result;
    std::istringstream text(comparison_text(config));
    for (std::string line; std::getline(text, line);) result.push_back(line);
    return result;
  };
  Config other = some_config();
  other.mutable_kv()->add_memory_bytes(7);
  other.mutable_kv()->add_memory_bytes(8);
  const auto a = lines(some_config());
  const auto b = lines(other);
  const auto empty = lines(Config());
  ASSERT_EQ(a.size(), b.size());
  ASSERT_EQ(a.size(), empty.size());
  std::vector<std::string> differing;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) differing.push_back(a[i] + " / " + b[i]);
    EXPECT_EQ(a[i].substr(0, a[i].find(' ')), empty[i].substr(0, empty[i].find(' ')));
  }
  EXPECT_THAT(differing,
              testing::ElementsAre("kv.memory_bytes = (not set) / kv.memory_bytes = 7,8"));
}

TEST(ConfigText, DifferentKeysAreNoticed) {
  Config one = some_config();
  Config other = one;
  one.mutable_api()->add_api_key("sk-one");
  other.mutable_api()->add_api_key("sk-two");
  EXPECT_NE(comparison_text(one), comparison_text(other));
}

}  // namespace
}  // namespace spindle::config
