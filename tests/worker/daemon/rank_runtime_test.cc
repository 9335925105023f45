#include "worker/daemon/rank_runtime.h"

#include <gtest/gtest.h>

#include "cluster/comm/local_group.h"
#include "tests/worker/local_cluster.h"

namespace spindle::worker {
namespace {

RankSettings mini_settings() {
  RankSettings settings;
  settings.model_dir = mini_model_dir();
  settings.max_num_seqs = 4;
  settings.host_name = "here";
  return settings;
}

Result<std::unique_ptr<RankRuntime>> create(const RankSettings& settings, int rank = 0,
                                            int n_ranks = 2) {
  comm::LocalCluster groups(n_ranks);
  const auto model = model::load_model_config(settings.model_dir);
  if (!model.ok()) return model.status();
  const std::vector<DeviceFacts> facts(static_cast<std::size_t>(n_ranks), {"here", 0, 1});
  const auto topology = plan_topology(settings, *model, facts);
  if (!topology.ok()) return topology.status();
  return RankRuntime::create(settings, *topology, groups.host(rank), groups.device(rank));
}

TEST(RankRuntime, HoldsItsOwnLayers) {
  const auto first = create(mini_settings(), 0);
  const auto last = create(mini_settings(), 1);
  ASSERT_TRUE(first.ok() && last.ok());
  const control::StageInfo a = (*first)->info();
  const control::StageInfo b = (*last)->info();
  EXPECT_EQ(a.first_layer(), 0);
  EXPECT_EQ(a.n_layers() + b.n_layers(), 12);
  EXPECT_EQ(b.first_layer(), a.n_layers());
  EXPECT_EQ(a.kv_page_bytes(), 8192u);
  // Four sequences of 8192 tokens, 256 bytes a head and layer.
  EXPECT_EQ(a.kv_capacity_bytes(), 4ull * 8192 * 256 * 2 * static_cast<unsigned>(a.n_layers()));
  EXPECT_EQ(a.host(), "here");
}

TEST(RankRuntime, LayersPerStageOverrides) {
  RankSettings settings = mini_settings();
  settings.layers_per_stage = {2, 10};
  EXPECT_EQ((*create(settings, 1))->info().n_layers(), 10);
  settings.layers_per_stage = {2, 9};
  EXPECT_EQ(create(settings, 1).status().code(), StatusCode::kInvalidArgument);
}

TEST(RankRuntime, KvTakesWhatStatedMemoryLeaves) {
  RankSettings settings = mini_settings();
  settings.max_num_seqs = 64;
  settings.device_memory_bytes = {120 << 20, 80 << 20};
  const auto first = create(settings, 0);
  const auto last = create(settings, 1);
  ASSERT_TRUE(first.ok()) << first.status().to_string();
  ASSERT_TRUE(last.ok()) << last.status().to_string();
  for (const auto* rank : {&first, &last}) {
    const control::StageInfo info = (**rank)->info();
    const std::uint64_t memory = info.stage() == 0 ? 120u << 20 : 80u << 20;
    EXPECT_LT(info.weight_bytes() + info.kv_capacity_bytes(), memory);
    // The rest is workspace.
    EXPECT_GT(info.weight_bytes() + info.kv_capacity_bytes(), memory - (24u << 20));
  }
  EXPECT_GT((*first)->info().n_layers(), (*last)->info().n_layers());
}

TEST(RankRuntime, PoolsMayDiffer) {
  RankSettings settings = mini_settings();
  settings.max_num_seqs = 16;
  settings.max_model_len = 1024;
  settings.kv_bytes = {24 << 20, 8 << 20};
  const auto first = create(settings, 0);
  const auto last = create(settings, 1);
  ASSERT_TRUE(first.ok() && last.ok());
  EXPECT_EQ((*first)->info().kv_capacity_bytes(), 24u << 20);
  EXPECT_EQ((*last)->info().kv_capacity_bytes(), 8u << 20);
  EXPECT_EQ((*first)->info().n_layers(), 9);
}

TEST(RankRuntime, MistakesAreNamed) {
  RankSettings settings = mini_settings();
  settings.max_model_len = 9000;
  EXPECT_NE(create(settings).status().message().find("max_model_len"), std::string::npos);
  settings = mini_settings();
  settings.kv_bytes = {1 << 20};
  EXPECT_NE(create(settings).status().message().find("kv.memory_bytes"), std::string::npos);
  settings = mini_settings();
  settings.model_dir = "/nowhere";
  EXPECT_NE(create(settings).status().message().find("/nowhere"), std::string::npos);
  EXPECT_EQ(create(mini_settings(), 0, 13).status().code(), StatusCode::kInvalidArgument);
}

TEST(RankRuntime, DummyWeightsNeedOnlyTheShape) {
  RankSettings settings = mini_settings();
  settings.dummy_weights = true;
  const auto rank = create(settings, 0, 1);
  ASSERT_TRUE(rank.ok()) << rank.status().to_string();
  EXPECT_EQ((*rank)->info().n_layers(), 12);
}

}  // namespace
}  // namespace spindle::worker
