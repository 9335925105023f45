#include "worker/daemon/stage_costs.h"

#include <gtest/gtest.h>

#include "cluster/comm/local_group.h"
#include "tests/worker/local_cluster.h"
#include "worker/daemon/rank_runtime.h"

namespace spindle::worker {
namespace {

// 12 layers, hidden 256, intermediate 768, 4 heads and 2 KV heads of 64, vocabulary 4096, tied.
model::ModelConfig mini() {
  auto model = model::load_model_config(mini_model_dir());
  EXPECT_TRUE(model.ok()) << model.status().to_string();
  return *model;
}

TEST(StageCosts, ByHand) {
  RankSettings settings;
  settings.max_num_seqs = 4;
  const auto problem = stage_costs(settings, mini(), 8192, 2);
  ASSERT_EQ(problem.layers.size(), 12u);
  const std::int64_t matrices = 256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 768;
  EXPECT_EQ(problem.layers[5].weight_bytes, 2 * matrices + 2 * 256 * 4);
  EXPECT_EQ(problem.layers[5].kv_bytes_per_token, 2 * 2 * 64 * 2);
  EXPECT_DOUBLE_EQ(problem.layers[5].time, 2 * matrices + 1024 * 512);
  EXPECT_DOUBLE_EQ(problem.head.time, 2 * 256 * 4096);
  EXPECT_EQ(problem.head.weight_bytes, 2 * 256 * 4096 + 256 * 4);
  // The table and layer 0's K and V by token id.
  EXPECT_EQ(problem.embedding.weight_bytes, 2 * 256 * 4096 + 4096 * 2 * 2 * 64 * 2);
  EXPECT_EQ(problem.min_kv_tokens, 8192);
  EXPECT_EQ(problem.max_kv_tokens, 4 * 8192);
  ASSERT_EQ(problem.devices.size(), 2u);
  EXPECT_EQ(problem.devices[1].workspace_bytes - problem.devices[0].workspace_bytes, 4 * 4096 * 4);
}

TEST(StageCosts, AGpuReadsItsWeightsOnceForAllSequences) {
  RankSettings settings;
  settings.device = ComputeDevice::kCuda;
  const std::int64_t matrices = 256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 768;
  EXPECT_DOUBLE_EQ(stage_costs(settings, mini(), 8192, 2).layers[0].time,
                   2 * matrices + 8 * 1024 * 512);
  settings.max_num_seqs = 2;
  EXPECT_DOUBLE_EQ(stage_costs(settings, mini(), 100, 2).layers[0].time,
                   2 * matrices + 2 * 100 * 512);
}

TEST(StageCosts, KvCountsInWholePages) {
  EXPECT_EQ(stage_costs({}, mini(), 33, 1).min_kv_tokens, 64);
}

// What the stages say they hold once they are there; false when this CPU does not have the math.
bool check_weights(kernels::LinearMath math, int n_ranks) {
  RankSettings settings;
  settings.model_dir = mini_model_dir();
  settings.max_num_seqs = 1;
  settings.linear_math = math;
  const std::vector<DeviceFacts> facts(static_cast<std::size_t>(n_ranks));
  const auto topology = plan_topology(settings, mini(), facts);
  EXPECT_TRUE(topology.ok()) << topology.status().to_string();
  if (!topology.ok()) return true;
  comm::LocalCluster groups(n_ranks);
  for (int rank = 0; rank < n_ranks; ++rank) {
    const auto made =
        RankRuntime::create(settings, *topology, groups.host(rank), groups.device(rank));
    if (made.status().code() == StatusCode::kUnimplemented) return false;
    EXPECT_TRUE(made.ok()) << made.status().to_string();
    if (!made.ok()) return true;
    const auto held = static_cast<double>((*made)->info().weight_bytes());
    const auto planned = static_cast<double>(
        topology->partition.stages[static_cast<std::size_t>(rank)].weight_bytes);
    EXPECT_LE(planned, held);
    EXPECT_GE(planned, 0.98 * held);
  }
  return true;
}

TEST(StageCosts, WeightsAreThoseOfTheStages) {
  EXPECT_TRUE(check_weights(kernels::LinearMath::kF32, 1));
  EXPECT_TRUE(check_weights(kernels::LinearMath::kF32, 3));
}

TEST(StageCosts, WeightsAreThoseOfTheStagesInBf16) {
  if (!check_weights(kernels::LinearMath::kBF16, 3)) {
    GTEST_SKIP() << "oneDNN has no bf16 matmul for this CPU";
  }
}

}  // namespace
}  // namespace spindle::worker
