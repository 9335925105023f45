#include "worker/config/config_rules.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "worker/config/config_override.h"

namespace spindle::config {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using testing::HasSubstr;

Config valid_config() {
  Config config;
  config.mutable_model()->set_path("/data/some-model");
  fill_defaults(config);
  return config;
}

void collect_integers(const Descriptor& type, const std::string& prefix,
                      std::set<std::string>& paths) {
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor* field = type.field(i);
    const std::string path = prefix + field->name();
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      collect_integers(*field->message_type(), path + ".", paths);
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_INT32 ||
               field->cpp_type() == FieldDescriptor::CPPTYPE_INT64) {
      paths.insert(path);
    }
  }
}

TEST(ConfigRules, DefaultsAreWrittenOut) {
  const Config config = valid_config();
  EXPECT_TRUE(config.api().http().has_port());
  EXPECT_EQ(config.api().http().port(), 8000);
  EXPECT_EQ(config.api().tcp().port(), 8001);
  EXPECT_EQ(config.api().tcp().host(), "127.0.0.1");
  EXPECT_TRUE(config.kv().has_dtype());
  EXPECT_TRUE(config.model().use_generation_config());
  EXPECT_EQ(config.model().served_model_name(), "some-model");
  // Known only when the model and the ranks are.
  EXPECT_FALSE(config.model().has_max_model_len());
  EXPECT_EQ(config.kv().memory_bytes_size(), 0);
  EXPECT_EQ(config.cluster().device_memory_bytes_size(), 0);
  EXPECT_FALSE(config.scheduler().has_seed());
}

TEST(ConfigRules, DefaultsDoNotReplaceWhatIsSet) {
  Config config;
  config.mutable_model()->set_path("/data/some-model/");
  config.mutable_model()->set_served_model_name("mine");
  config.mutable_api()->mutable_http()->set_port(9);
  fill_defaults(config);
  EXPECT_EQ(config.model().served_model_name(), "mine");
  EXPECT_EQ(config.api().http().port(), 9);
}

TEST(ConfigRules, EveryIntegerOfTheSchemaHasARange) {
  std::set<std::string> in_schema;
  collect_integers(*Config::descriptor(), "", in_schema);
  std::set<std::string> with_range;
  for (const IntegerRange& range : integer_ranges()) with_range.insert(std::string(range.path));
  EXPECT_EQ(in_schema, with_range);
}

TEST(ConfigRules, DefaultsAreValid) {
  EXPECT_TRUE(validate_config(valid_config()).ok()) << validate_config(valid_config()).to_string();
}

// apply_override does not reach into lists of groups.
Status set_integer(Config& config, const std::string& path, std::int64_t value) {
  static const std::string kOverrides = "kv.policy.overrides.";
  if (!path.starts_with(kOverrides)) return apply_override(config, path, std::to_string(value));
  KvOverride* group = config.mutable_kv()->mutable_policy()->add_overrides();
  const FieldDescriptor* field =
      KvOverride::descriptor()->FindFieldByName(path.substr(kOverrides.size()));
  if (field->cpp_type() == FieldDescriptor::CPPTYPE_INT32) {
    group->GetReflection()->SetInt32(group, field, static_cast<std::int32_t>(value));
  } else {
    group->GetReflection()->SetInt64(group, field, value);
  }
  if (path.ends_with("first_layer")) group->set_last_layer(4095);
  fill_defaults(config);
  return ok_status();
}

TEST(ConfigRules, BothEndsOfEveryRange) {
  for (const IntegerRange& range : integer_ranges()) {
    const std::string path(range.path);
    for (const std::int64_t value : {range.least, range.most}) {
      Config config = valid_config();
      ASSERT_TRUE(set_integer(config, path, value).ok()) << path;
      const Status status = validate_config(config);
      EXPECT_TRUE(status.ok()) << status.to_string();
    }
    for (const std::int64_t value : {range.least - 1, range.most + 1}) {
      Config config = valid_config();
      ASSERT_TRUE(set_integer(config, path, value).ok()) << path;
      const Status status = validate_config(config);
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << path << " = " << value;
      EXPECT_THAT(status.message(), HasSubstr(path + " must be from "));
      EXPECT_THAT(status.message(), HasSubstr("got " + std::to_string(value)));
    }
  }
}

struct BadConfig {
  const char* path;
  const char* value;
  const char* message;
};

class BadConfigs : public testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigs, NameTheField) {
  Config config = valid_config();
  ASSERT_TRUE(apply_override(config, GetParam().path, GetParam().value).ok());
  const Status status = validate_config(config);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadConfigs,
    testing::Values(BadConfig{"model.path", "", "model.path is not set"},
                    BadConfig{"model.path", "a\nb", "model.path contains a control character"},
                    BadConfig{"model.served_model_name", "", "model.served_model_name is empty"},
                    BadConfig{"api.http.host", "", "api.http.host is empty"},
                    BadConfig{"api.tcp.host", "", "api.tcp.host is empty"},
                    BadConfig{"api.tcp.port", "8000", "api.http.port and api.tcp.port"},
                    BadConfig{"api.api_key", "good,,other", "api.api_key holds an empty key"},
                    BadConfig{"api.api_key", "<hidden>", "the placeholder"},
                    BadConfig{"kv.policy.profile", "best", "kv.policy.profile must be one of"},
                    BadConfig{"kv.policy.ratio", "0", "kv.policy.ratio must be above 0"},
                    BadConfig{"api.limits.min_kv_ratio", "0", "api.limits.min_kv_ratio must be"},
                    BadConfig{"api.limits.min_kv_ratio", "nan", "api.limits.min_kv_ratio must be"},
                    BadConfig{"cluster.layers_per_stage", "6,0", "cluster.layers_per_stage"},
                    BadConfig{"cluster.device_memory_bytes", "8000000000,0",
                              "cluster.device_memory_bytes must be from 1048576"},
                    BadConfig{"kv.memory_bytes", "8000000000,-1",
                              "kv.memory_bytes must be from 1048576"}));

TEST(ConfigRules, ListsOfGroupsAreFilledAndChecked) {
  Config config;
  config.mutable_model()->set_path("/data/some-model");
  config.mutable_kv()->mutable_policy()->add_overrides();
  fill_defaults(config);
  EXPECT_TRUE(config.kv().policy().overrides(0).has_kv_head());
  EXPECT_FALSE(config.kv().policy().overrides(0).has_mode());
  EXPECT_TRUE(validate_config(config).ok()) << validate_config(config).to_string();
  config.mutable_kv()->mutable_policy()->add_overrides()->set_codec("a\nb");
  EXPECT_THAT(validate_config(config).message(), HasSubstr("kv.policy.overrides.codec contains"));
}

TEST(ConfigRules, OneListenerMustStay) {
  Config config = valid_config();
  config.mutable_api()->mutable_http()->set_enabled(false);
  EXPECT_TRUE(validate_config(config).ok());
  config.mutable_api()->mutable_tcp()->set_enabled(false);
  EXPECT_THAT(validate_config(config).message(), HasSubstr("api.http.enabled"));
}

TEST(ConfigRules, OnePortOnTwoAddressesIsFine) {
  Config config = valid_config();
  config.mutable_api()->mutable_tcp()->set_port(8000);
  config.mutable_api()->mutable_tcp()->set_host("127.0.0.2");
  EXPECT_TRUE(validate_config(config).ok());
}

}  // namespace
}  // namespace spindle::config
