// What the planning of stages counts for weights, against the stages themselves.

#include <gtest/gtest.h>

#include "cluster/comm/local_group.h"
#include "cluster/coordinator/stage_costs.h"
#include "tests/source_dir.h"
#include "tests/worker/local_cluster.h"
#include "worker/daemon/rank_runtime.h"
#include "worker/model/checkpoint.h"
#include "worker/model/llama_weights.h"
#include "worker/model/model_shape.h"

namespace spindle::worker {
namespace {

// What the stages say they hold once they are there; false when this CPU does not have the math.
bool check_weights(bool bf16_math, int n_ranks) {
  RankSettings settings;
  settings.model_dir = mini_model_dir();
  settings.max_num_seqs = 1;
  settings.bf16_math = bf16_math;
  const auto model = model::load_model_config(mini_model_dir());
  EXPECT_TRUE(model.ok()) << model.status().to_string();
  if (!model.ok()) return true;
  const std::vector<DeviceFacts> facts(static_cast<std::size_t>(n_ranks));
  const auto topology = plan_topology(settings, *model, facts);
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

TEST(StageWeights, WeightsAreThoseOfTheStages) {
  EXPECT_TRUE(check_weights(false, 1));
  EXPECT_TRUE(check_weights(false, 3));
}

TEST(StageWeights, WeightsAreThoseOfTheStagesInBf16) {
  if (!check_weights(true, 3)) {
    GTEST_SKIP() << "oneDNN has no bf16 matmul for this CPU";
  }
}

TEST(StageWeights, TheWholeModelIsAsLargeAsItsFiles) {
  const auto model = model::load_model_config(mini_model_dir());
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  const auto checkpoint = model::Checkpoint::open(mini_model_dir());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().to_string();
  std::uint64_t bytes = 0;
  for (const std::string& name : checkpoint->names()) {
    const auto tensor = checkpoint->find(name);
    ASSERT_TRUE(tensor.ok()) << tensor.status().to_string();
    bytes += tensor->info->n_bytes();
  }
  EXPECT_EQ(2 * static_cast<std::uint64_t>(*model::count_weights(*model)), bytes);
  // The same by parts, with the tied table once, but norms in 32 bits instead of 16.
  coordinator::ClusterSettings settings;
  settings.token_table_bytes = 0;
  const auto costs = coordinator::stage_costs(settings, model::model_shape(*model, false), 8192, 1);
  std::int64_t sum = costs.head.weight_bytes;
  for (const coordinator::PartCost& layer : costs.layers) sum += layer.weight_bytes;
  const std::int64_t norms = std::int64_t{2} * model->n_layers + 1;
  EXPECT_EQ(static_cast<std::uint64_t>(sum - norms * model->hidden_size * 2), bytes);
}

// A layer in the middle of a shape, with random weights.
TEST(StageWeights, DummyLayersAreAsLargeAsPlanned) {
  for (const char* name : {"llama-3.2-1b", "llama-3-8b"}) {
    const auto model = model::load_model_config(source_dir() + "/models/shapes/" + name);
    ASSERT_TRUE(model.ok()) << model.status().to_string();
    const auto stage = model::make_dummy_llama_stage(*model, {5, 1}, false, false, 1);
    ASSERT_TRUE(stage.ok()) << stage.status().to_string();
    const model::LlamaLayerWeights& layer = stage->layers.at(0);
    std::size_t bytes = 0;
    for (const model::HostTensor* matrix :
         {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj, &layer.gate_proj,
          &layer.up_proj, &layer.down_proj}) {
      bytes += matrix->data.bytes().size();
    }
    const auto costs = coordinator::stage_costs({}, model::model_shape(*model, true), 8192, 4);
    EXPECT_EQ(static_cast<std::size_t>(costs.layers[5].weight_bytes),
              bytes + 2 * static_cast<std::size_t>(model->hidden_size) * sizeof(float))
        << name;
  }
}

}  // namespace
}  // namespace spindle::worker
