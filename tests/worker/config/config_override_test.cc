#include "worker/config/config_override.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace spindle::config {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

TEST(ConfigOverride, EveryKindOfValue) {
  Config config;
  ASSERT_TRUE(apply_assignment(config, "api.http.port=9000").ok());
  ASSERT_TRUE(apply_assignment(config, "kv.memory_bytes=5000000000").ok());
  ASSERT_TRUE(apply_assignment(config, "scheduler.seed=18446744073709551615").ok());
  ASSERT_TRUE(apply_assignment(config, "api.http.enabled=false").ok());
  ASSERT_TRUE(apply_assignment(config, "kv.dtype=BF16").ok());
  ASSERT_TRUE(apply_assignment(config, "log.format=json").ok());
  ASSERT_TRUE(apply_assignment(config, "model.served_model_name=a=b,c").ok());
  EXPECT_EQ(config.api().http().port(), 9000);
  EXPECT_THAT(config.kv().memory_bytes(), ElementsAre(5000000000));
  EXPECT_EQ(config.scheduler().seed(), 18446744073709551615U);
  EXPECT_FALSE(config.api().http().enabled());
  EXPECT_EQ(config.kv().dtype(), Kv::BF16);
  EXPECT_EQ(config.log().format(), Log::JSON);
  EXPECT_EQ(config.model().served_model_name(), "a=b,c");
}

TEST(ConfigOverride, RepeatedFieldsAreReplaced) {
  Config config;
  config.mutable_cluster()->add_layers_per_stage(12);
  ASSERT_TRUE(apply_override(config, "cluster.layers_per_stage", "4,5,3").ok());
  EXPECT_THAT(config.cluster().layers_per_stage(), ElementsAre(4, 5, 3));
  ASSERT_TRUE(apply_override(config, "cluster.layers_per_stage", "12").ok());
  EXPECT_THAT(config.cluster().layers_per_stage(), ElementsAre(12));
  ASSERT_TRUE(apply_override(config, "cluster.layers_per_stage", "").ok());
  EXPECT_THAT(config.cluster().layers_per_stage(), ElementsAre());
  ASSERT_TRUE(apply_override(config, "kv.memory_bytes", "8000000000,4000000000").ok());
  EXPECT_THAT(config.kv().memory_bytes(), ElementsAre(8000000000, 4000000000));
  ASSERT_TRUE(apply_override(config, "cluster.device_memory_bytes", "9000000000").ok());
  EXPECT_THAT(config.cluster().device_memory_bytes(), ElementsAre(9000000000));
  ASSERT_TRUE(apply_override(config, "api.api_key", "k1,k2").ok());
  EXPECT_THAT(config.api().api_key(), ElementsAre("k1", "k2"));
}

struct BadOverride {
  const char* path;
  const char* value;
  const char* names;  // the part of the message that says what would have been valid
};

class BadOverrides : public testing::TestWithParam<BadOverride> {};

TEST_P(BadOverrides, AreRefusedAndChangeNothing) {
  Config config;
  config.mutable_cluster()->add_layers_per_stage(12);
  const std::string before = config.SerializeAsString();
  const Status status = apply_override(config, GetParam().path, GetParam().value);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(),
              AllOf(HasSubstr("'" + std::string(GetParam().path)), HasSubstr(GetParam().names)));
  EXPECT_EQ(config.SerializeAsString(), before);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadOverrides,
    testing::Values(BadOverride{"api.http.prot", "1",
                                "'api.http' has no field 'prot'; it has enabled, host, port"},
                    BadOverride{"sheduler.seed", "1",
                                "the configuration has no field 'sheduler'; it has model, "},
                    BadOverride{"", "1", "has no field ''"},
                    BadOverride{"api.", "1", "has no field ''"},
                    BadOverride{"api.http", "1",
                                "is a group; set one of its fields: enabled, host, port"},
                    BadOverride{"api.http.port.number", "1", "'api.http.port' is a value"},
                    BadOverride{"kv.dtype", "F8", "one of AUTO, F32, F16, BF16, got 'F8'"},
                    BadOverride{"kv.dtype", "", "one of AUTO"},
                    BadOverride{"api.http.port", "80x", "a 32-bit integer, got '80x'"},
                    BadOverride{"api.http.port", "", "a 32-bit integer"},
                    BadOverride{"api.http.port", "+1", "a 32-bit integer"},
                    BadOverride{"api.http.port", "4294967296", "a 32-bit integer"},
                    BadOverride{"scheduler.seed", "-1", "a 64-bit integer from 0"},
                    BadOverride{"api.http.enabled", "yes", "true or false, got 'yes'"},
                    BadOverride{"cluster.layers_per_stage", "4,,3", "got ''"},
                    BadOverride{"cluster.layers_per_stage", "4,x", "got 'x'"}));

TEST(ConfigOverride, AnAssignmentNeedsAPathAndAnEqualsSign) {
  Config config;
  EXPECT_THAT(apply_assignment(config, "api.http.port").message(), HasSubstr("FIELD=VALUE"));
  EXPECT_THAT(apply_assignment(config, "=3").message(), HasSubstr("FIELD=VALUE"));
  EXPECT_THAT(apply_assignment(config, "").message(), HasSubstr("FIELD=VALUE"));
}

}  // namespace
}  // namespace spindle::config
