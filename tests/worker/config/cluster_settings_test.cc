#include "worker/config/cluster_settings.h"

#include <gtest/gtest.h>

#include "worker/config/config_loader.h"
#include "worker/config/config_rules.h"

namespace spindle::config {
namespace {

using coordinator::ComputeDevice;

coordinator::ClusterSettings settings_of(const std::string& text) {
  auto config = parse_config_text(text, "test");
  if (!config.ok()) {
    ADD_FAILURE() << config.status().to_string();
    return {};
  }
  fill_defaults(*config);
  return cluster_settings(*config);
}

TEST(ClusterSettings, OfAnEmptyConfigurationAreTheDefaults) {
  const coordinator::ClusterSettings settings = settings_of("");
  const coordinator::ClusterSettings defaults;
  EXPECT_EQ(settings.max_model_len, 0);
  EXPECT_EQ(settings.max_num_seqs, defaults.max_num_seqs);
  EXPECT_EQ(settings.max_num_batched_tokens, defaults.max_num_batched_tokens);
  EXPECT_EQ(settings.token_table_bytes, defaults.token_table_bytes);
  EXPECT_EQ(settings.kv_dtype, DType::kF16);
  EXPECT_EQ(settings.device, ComputeDevice::kCpu) << "what AUTO comes to is decided at start";
  EXPECT_DOUBLE_EQ(settings.gpu_memory_utilization, defaults.gpu_memory_utilization);
  EXPECT_FALSE(settings.bf16_math);
  EXPECT_TRUE(settings.layers_per_stage.empty());
}

TEST(ClusterSettings, TakeEveryFieldThatPlansLookAt) {
  const coordinator::ClusterSettings settings = settings_of(
      "model { max_model_len: 4096 } cluster { layers_per_stage: 3 layers_per_stage: 4 "
      "device_memory_bytes: 5000 } kv { memory_bytes: 700 memory_bytes: 800 dtype: BF16 "
      "layer0_table_bytes: 99 } scheduler { max_num_seqs: 5 max_num_batched_tokens: 256 } "
      "compute { device: CUDA gpu_memory_utilization: 0.5 linear_math: BF16 }");
  EXPECT_EQ(settings.max_model_len, 4096);
  EXPECT_EQ(settings.layers_per_stage, (std::vector<int>{3, 4}));
  EXPECT_EQ(settings.device_memory_bytes, (std::vector<std::int64_t>{5000}));
  EXPECT_EQ(settings.kv_bytes, (std::vector<std::int64_t>{700, 800}));
  EXPECT_EQ(settings.kv_dtype, DType::kBF16);
  EXPECT_EQ(settings.token_table_bytes, 99u);
  EXPECT_EQ(settings.max_num_seqs, 5);
  EXPECT_EQ(settings.max_num_batched_tokens, 256);
  EXPECT_EQ(settings.device, ComputeDevice::kCuda);
  EXPECT_DOUBLE_EQ(settings.gpu_memory_utilization, 0.5);
  EXPECT_TRUE(settings.bf16_math);
}

}  // namespace
}  // namespace spindle::config
