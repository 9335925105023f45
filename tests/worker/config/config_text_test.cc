#include "worker/config/config_text.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

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
  EXPECT_THAT(text, HasSubstr("# api.api_key: none"));
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
  EXPECT_THAT(text, HasSubstr("api.http.port = 8000\n"));
  EXPECT_THAT(text, HasSubstr("model.path = \"/data/some \\\"model\\\"\"\n"));
}

TEST(ConfigText, DifferencesAreNamed) {
  const Config one = some_config();
  Config other = one;
  other.mutable_api()->mutable_http()->set_port(9000);
  const auto difference = [](const Config& a, const Config& b) {
    return describe_difference(comparison_text(a), "rank 0", comparison_text(b), "rank 1");
  };
  EXPECT_EQ(difference(one, one), "");
  EXPECT_EQ(difference(one, other), "api.http.port is 8000 on rank 0 and 9000 on rank 1");

  other = one;
  other.mutable_kv()->set_memory_bytes(7);
  EXPECT_EQ(difference(one, other), "kv.memory_bytes is not set on rank 0 and 7 on rank 1");
  EXPECT_EQ(difference(other, one), "kv.memory_bytes is 7 on rank 0 and not set on rank 1");
}

TEST(ConfigText, DifferentKeysAreNoticedAndNotShown) {
  Config one = some_config();
  Config other = one;
  one.mutable_api()->add_api_key("sk-one");
  other.mutable_api()->add_api_key("sk-two");
  const std::string text =
      describe_difference(comparison_text(one), "rank 0", comparison_text(other), "rank 1");
  EXPECT_THAT(text, HasSubstr("api.api_key differs between rank 0 and rank 1"));
  EXPECT_THAT(text, HasSubstr("mpirun -x SPINDLE_API_KEY"));
  EXPECT_THAT(text, Not(HasSubstr("sk-")));
}

}  // namespace
}  // namespace spindle::config
