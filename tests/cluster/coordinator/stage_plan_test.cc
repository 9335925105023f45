// The sizes of pools; splits are tests/worker/daemon/topology_test.cc's.

#include "cluster/coordinator/stage_plan.h"

#include <gtest/gtest.h>

namespace spindle::coordinator {
namespace {

TEST(StagePools, KvTakesWhatItNeedsButAtMostHalfOfFreeMemory) {
  EXPECT_EQ(default_kv_bytes(100, 1000, 2), 100u);
  EXPECT_EQ(default_kv_bytes(1000, 1000, 2), 250u);
  EXPECT_EQ(default_kv_bytes(1000, 0, 2), 1000u);  // unknown
}

TEST(StagePools, OnTheCpuStatedMemoryComesFirst) {
  StagePrediction stage;
  EXPECT_EQ(cpu_pool_bytes({.kv_bytes = 77}, stage, 100, 4, 0, 1), 77u);
  EXPECT_EQ(cpu_pool_bytes({}, stage, 100, 4, 0, 1), 400u);
  EXPECT_EQ(cpu_pool_bytes({}, stage, 100, 4, 600, 1), 300u);
  stage.kv_bytes = 350;  // what memory leaves
  EXPECT_EQ(cpu_pool_bytes({}, stage, 100, 4, 600, 1), 350u);
  EXPECT_EQ(cpu_pool_bytes({}, stage, 100, 2, 600, 1), 200u);
}

TEST(StagePools, OnAGpuTheShareLessWhatIsUsedAndTheScratch) {
  GpuMemory memory{.total_bytes = 1000,
                   .free_at_start = 950,
                   .free_now = 650,
                   .scratch_bytes = 40,
                   .utilization = 0.9};
  EXPECT_EQ(gpu_pool_bytes(memory), 900u - 300 - 40);
  memory.free_now = 0;
  EXPECT_EQ(gpu_pool_bytes(memory), 0u);
  memory.free_now = 650;
  memory.stated_bytes = 500;
  EXPECT_EQ(gpu_pool_bytes(memory), 500u - 300 - 40);
  // Of a GPU that others use too, only the plan says what is this rank's.
  memory.ranks_here = 2;
  memory.planned_bytes = 200;
  EXPECT_EQ(gpu_pool_bytes(memory), 500u - 200 - 40);
  memory.stated_bytes = 0;
  EXPECT_EQ(gpu_pool_bytes(memory), 450u - 300 - 40);
}

TEST(StagePools, OneSequenceIsInWholePages) {
  const ModelShape model{.n_layers = 4, .n_kv_heads = 2, .head_dim = 64};
  EXPECT_EQ(one_sequence_bytes({}, model, 33, 3), 2u * 3 * 2 * 64 * 2 * 2 * 32);
}

TEST(StagePlan, ALengthBeyondTheModelsIsRefused) {
  const ModelShape model{.max_position_embeddings = 100};
  EXPECT_EQ(*resolve_max_model_len({}, model), 100);
  ClusterSettings settings;
  settings.max_model_len = 60;
  EXPECT_EQ(*resolve_max_model_len(settings, model), 60);
  settings.max_model_len = 101;
  const Status status = resolve_max_model_len(settings, model).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("model.max_model_len is 101"), std::string::npos);
}

}  // namespace
}  // namespace spindle::coordinator
