// The capacity study's parts: what its loads and clusters are, and that a small cell adds up.

#include <gtest/gtest.h>

#include <algorithm>

#include "cluster/coordinator/bench/capacity_cluster.h"
#include "cluster/coordinator/bench/capacity_load.h"
#include "cluster/coordinator/bench/capacity_run.h"

namespace spindle::coordinator::bench {
namespace {

CapacitySettings settings_8b(int n_stages) {
  CapacitySettings settings;
  settings.shape = *model_shape("8b");
  settings.rates = h200_rates();
  settings.n_stages = n_stages;
  settings.memory_bytes = 24'000'000'000;
  settings.max_model_len = 4096;
  settings.max_num_seqs = 64;
  settings.max_num_batched_tokens = 512;
  settings.mean_output = 30;
  settings.seed = 1;
  return settings;
}

std::int64_t no_time() { return 0; }

TEST(CapacityLoad, LengthsAreTheStatedDistribution) {
  LoadSettings load;
  load.seed = 7;
  std::vector<std::int32_t> lengths = prompt_lengths(load);
  ASSERT_EQ(lengths.size(), 10'000u);
  EXPECT_EQ(lengths, prompt_lengths(load)) << "a seed says everything";
  std::sort(lengths.begin(), lengths.end());
  EXPECT_GE(lengths.front(), 1);
  EXPECT_LE(lengths.back(), load.max_prompt);
  // Documents are 3 in 100, and most of them longer than the median.
  EXPECT_NEAR(lengths[5000], load.median_prompt, 60);
  const auto n_long = lengths.end() - std::lower_bound(lengths.begin(), lengths.end(), 16'000);
  EXPECT_GT(n_long, 100);
  EXPECT_LT(n_long, 300);
}

TEST(CapacityLoad, RequestsAskForWhatTheLoadSays) {
  LoadSettings load;
  load.vocab_size = 10;
  load.max_output = 5;
  const engine::EngineRequest request = load_request(load, 3, 40);
  ASSERT_EQ(request.prompt_ids.size(), 40u);
  for (const std::int32_t id : request.prompt_ids) EXPECT_TRUE(id >= 0 && id < 10);
  EXPECT_EQ(request.sampling.max_tokens, 5);
  EXPECT_EQ(request.prompt_ids, load_request(load, 3, 40).prompt_ids);
  EXPECT_NE(request.prompt_ids, load_request(load, 4, 40).prompt_ids);
}

TEST(CapacityCluster, ShapesHaveTheirKnownSizes) {
  const ModelShape small = *model_shape("8b");
  const double total = small.n_layers * small.layer_parameters() + 2 * small.head_parameters();
  EXPECT_NEAR(total, 8.03e9, 0.01e9);
  const ModelShape large = *model_shape("70b");
  EXPECT_NEAR(large.n_layers * large.layer_parameters() + 2 * large.head_parameters(), 70.5e9,
              0.1e9);
  EXPECT_FALSE(model_shape("9b").ok());
}

TEST(CapacityCluster, StagesShareLayersTimeAndMemory) {
  const auto cluster = capacity_cluster(settings_8b(4));
  ASSERT_TRUE(cluster.ok()) << cluster.status().to_string();
  ASSERT_EQ(cluster->stages.size(), 4u);
  int n_layers = 0;
  double weights_us = 0;
  for (std::size_t s = 0; s < 4; ++s) {
    n_layers += cluster->stages[s].n_layers;
    weights_us += cluster->latency[s].weights;
    EXPECT_GT(cluster->stages[s].n_pages, 100'000);
  }
  EXPECT_EQ(n_layers, 32);
  // All weights but the embedding, read once.
  EXPECT_NEAR(weights_us, (8.03e9 - 0.525e9) * 2 / h200_rates().read_bytes_per_us, 20);
  EXPECT_EQ(capacity_cluster(settings_8b(64)).status().code(), StatusCode::kInvalidArgument);

  CapacitySettings uneven = settings_8b(4);
  uneven.memories = Memories::kOneThird;
  const auto tight = capacity_cluster(uneven);
  ASSERT_TRUE(tight.ok()) << tight.status().to_string();
  EXPECT_LT(tight->stages[2].n_pages, cluster->stages[2].n_pages / 2);

  CapacitySettings large = settings_8b(2);
  large.shape = *model_shape("70b");
  EXPECT_EQ(capacity_cluster(large).status().code(), StatusCode::kResourceExhausted);
}

TEST(CapacityCluster, BalancingNeedsAPolicyWithLevels) {
  CapacitySettings settings = settings_8b(2);
  settings.balances = true;
  settings.typical_tokens = 800;
  EXPECT_FALSE(capacity_cluster(settings).ok()) << "full precision has no levels";
  settings.policy.profile = kvstore::KvProfile::kSnapKv;
  settings.policy.best_effort = true;
  const auto cluster = capacity_cluster(settings);
  ASSERT_TRUE(cluster.ok()) << cluster.status().to_string();
  EXPECT_TRUE(cluster->balance.has_value());
}

TEST(CapacityRun, ASmallCellAddsUp) {
  const auto cluster = capacity_cluster(settings_8b(2));
  ASSERT_TRUE(cluster.ok());
  LoadSettings load;
  load.n_requests = 300;
  load.median_prompt = 100;
  load.max_prompt = 1000;
  load.max_output = 100;
  load.vocab_size = 128256;
  load.n_waiting = 20;
  load.seed = 3;
  const CapacityResult result = run_capacity(*cluster, load, no_time);
  EXPECT_EQ(result.violation, "");
  EXPECT_TRUE(result.waits);
  EXPECT_GT(result.concurrency, 30);
  EXPECT_LE(result.concurrency, 80) << "64 sequences, and those that are being freed";
  EXPECT_GT(result.makespan_s, result.window_s);
  EXPECT_NEAR(result.mean_output, 30, 8);  // geometric, cut at 100
  EXPECT_NEAR(result.run_per_s, result.batch_tokens / result.step_us * 1e6, 1);
  for (const StageUse& stage : result.stages) {
    EXPECT_GT(stage.busy_share, 0.1);
    EXPECT_LE(stage.busy_share, 1.001);
    EXPECT_GT(stage.used_share, 0);
    EXPECT_LE(stage.used_share + stage.reserved_share, 1);
  }
  const CapacityResult again = run_capacity(*cluster, load, no_time);
  EXPECT_EQ(again.output_per_s, result.output_per_s);
  EXPECT_EQ(again.makespan_s, result.makespan_s);
}

}  // namespace
}  // namespace spindle::coordinator::bench
