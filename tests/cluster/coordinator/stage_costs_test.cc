#include "cluster/coordinator/stage_costs.h"

#include <gtest/gtest.h>

namespace spindle::coordinator {
namespace {

ModelShape mini() {
  return {.n_layers = 12,
          .hidden_size = 256,
          .intermediate_size = 768,
          .n_heads = 4,
          .n_kv_heads = 2,
          .head_dim = 64,
          .vocab_size = 4096,
          .max_position_embeddings = 8192,
          .ties_embeddings = true};
}

TEST(StageCosts, ByHand) {
  ClusterSettings settings;
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
  ClusterSettings settings;
  settings.device = ComputeDevice::kCuda;
  settings.max_num_seqs = 64;
  const std::int64_t matrices = 256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 768;
  EXPECT_DOUBLE_EQ(stage_costs(settings, mini(), 8192, 2).layers[0].time,
                   2 * matrices + 32 * 1024 * 512);
  settings.max_num_seqs = 5;
  EXPECT_DOUBLE_EQ(stage_costs(settings, mini(), 100, 2).layers[0].time,
                   2 * matrices + 3 * 100 * 512);
}

TEST(StageCosts, KvCountsInWholePages) {
  EXPECT_EQ(stage_costs({}, mini(), 33, 1).min_kv_tokens, 64);
}

TEST(StageCosts, AHeadThatIsTheEmbeddingIsHeldOnceByAGpuOfItsOwn) {
  ClusterSettings settings;
  settings.device = ComputeDevice::kCuda;
  settings.token_table_bytes = 0;
  const std::int64_t table = std::int64_t{2} * 256 * 4096;
  EXPECT_EQ(stage_costs(settings, mini(), 8192, 1).embedding.weight_bytes, 0);
  EXPECT_EQ(stage_costs(settings, mini(), 8192, 2).embedding.weight_bytes, table);
  EXPECT_EQ(stage_costs({}, mini(), 8192, 1).head.weight_bytes, table + 256 * 4);
}

TEST(StageCosts, WeightsOf32BitsAreHeldAsTheyAreOnTheCpu) {
  ModelShape model = mini();
  const auto half = stage_costs({}, model, 8192, 1).layers[0].weight_bytes - 2 * 256 * 4;
  model.has_f32_weights = true;
  EXPECT_EQ(stage_costs({}, model, 8192, 1).layers[0].weight_bytes - 2 * 256 * 4, 2 * half);
}

}  // namespace
}  // namespace spindle::coordinator
