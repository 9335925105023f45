#include "worker/daemon/topology.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <thread>

#include "cluster/comm/local_group.h"
#include "tests/worker/local_cluster.h"
#include "tests/worker/model/model_files.h"

namespace spindle::worker {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr std::int64_t kMB = 1'000'000;

RankSettings mini_settings() {
  RankSettings settings;
  settings.model_dir = mini_model_dir();
  settings.host_name = "here";
  settings.max_num_seqs = 16;
  return settings;
}

model::ModelConfig mini() {
  auto model = model::load_model_config(mini_model_dir());
  EXPECT_TRUE(model.ok()) << model.status().to_string();
  return *model;
}

std::vector<DeviceFacts> cpus(std::size_t n) { return std::vector<DeviceFacts>(n, {"here", 0, 1}); }

std::vector<int> counts_of(const Result<Topology>& topology) {
  std::vector<int> counts;
  EXPECT_TRUE(topology.ok()) << topology.status().to_string();
  if (!topology.ok()) return counts;
  for (const auto& stage : topology->partition.stages) counts.push_back(stage.layers.count);
  return counts;
}

std::string error_of(const RankSettings& settings, const std::vector<DeviceFacts>& facts) {
  return plan_topology(settings, mini(), facts).status().message();
}

TEST(PlanTopology, WithoutKnownMemoryTimeAloneCounts) {
  EXPECT_THAT(counts_of(plan_topology(mini_settings(), mini(), cpus(2))), ElementsAre(7, 5));
  const auto facts = cpus(1);
  EXPECT_THAT(counts_of(plan_topology(mini_settings(), mini(), facts)), ElementsAre(12));
}

TEST(PlanTopology, StatedMemoryMovesLayers) {
  RankSettings settings = mini_settings();
  settings.device_memory_bytes = {120 * kMB, 60 * kMB};
  const auto topology = plan_topology(settings, mini(), cpus(2));
  const std::vector<int> counts = counts_of(topology);
  ASSERT_EQ(counts.size(), 2u);
  EXPECT_GT(counts[0], 7);
  EXPECT_EQ(topology->devices[1].memory_bytes, 60 * kMB);
  settings.device_memory_bytes = {60 * kMB, 120 * kMB};
  EXPECT_LT(counts_of(plan_topology(settings, mini(), cpus(2)))[0], 6);
}

TEST(PlanTopology, PoolsThatDifferMoveLayers) {
  RankSettings settings = mini_settings();
  settings.max_model_len = 1024;
  settings.kv_bytes = {24 << 20, 8 << 20};
  EXPECT_THAT(counts_of(plan_topology(settings, mini(), cpus(2))), ElementsAre(9, 3));
  settings.layers_per_stage = {8, 4};
  EXPECT_THAT(counts_of(plan_topology(settings, mini(), cpus(2))), ElementsAre(8, 4));
}

TEST(PlanTopology, OneEntryIsForAllRanks) {
  RankSettings settings = mini_settings();
  settings.max_model_len = 1024;
  settings.kv_bytes = {8 << 20};
  const auto topology = plan_topology(settings, mini(), cpus(3));
  ASSERT_TRUE(topology.ok()) << topology.status().to_string();
  for (const auto& stage : topology->partition.stages) EXPECT_EQ(stage.kv_bytes, 8 << 20);
}

TEST(PlanTopology, ThreadsAreSpeed) {
  std::vector<DeviceFacts> facts = cpus(2);
  facts[0].speed = 3;
  EXPECT_GT(counts_of(plan_topology(mini_settings(), mini(), facts))[0], 8);
  facts[1].speed = 0;  // not known: all count as equal
  EXPECT_THAT(counts_of(plan_topology(mini_settings(), mini(), facts)), ElementsAre(7, 5));
}

TEST(PlanTopology, OnGpusMemoryIsShared) {
  RankSettings settings = mini_settings();
  settings.device = ComputeDevice::kCuda;
  settings.gpu_memory_utilization = 0.5;
  const std::vector<DeviceFacts> facts = {
      {"a", 1000 * kMB, 100}, {"b", 1000 * kMB, 100}, {"b", 1000 * kMB, 100}};
  auto topology = plan_topology(settings, mini(), facts);
  ASSERT_TRUE(topology.ok()) << topology.status().to_string();
  EXPECT_EQ(topology->devices[0].memory_bytes, 500 * kMB);
  EXPECT_EQ(topology->devices[1].memory_bytes, 250 * kMB);
  EXPECT_DOUBLE_EQ(topology->devices[0].speed, 1);
  EXPECT_DOUBLE_EQ(topology->devices[2].speed, 0.5);
  EXPECT_GT(topology->partition.stages[0].layers.count, topology->partition.stages[1].layers.count);
  // A stated pool may take what the share would leave.
  settings.kv_bytes = {200 * kMB};
  topology = plan_topology(settings, mini(), facts);
  ASSERT_TRUE(topology.ok()) << topology.status().to_string();
  EXPECT_EQ(topology->devices[1].memory_bytes, 500 * kMB);
}

TEST(PlanTopology, NamesTheFieldAndTheRank) {
  RankSettings settings = mini_settings();
  settings.kv_bytes = {8 << 20, 8 << 20, 8 << 20};
  EXPECT_THAT(error_of(settings, cpus(2)), HasSubstr("kv.memory_bytes has 3 entries for 2 ranks"));
  settings = mini_settings();
  settings.device_memory_bytes = {60 * kMB, 60 * kMB};
  EXPECT_THAT(error_of(settings, cpus(1)),
              HasSubstr("cluster.device_memory_bytes has 2 entries for 1 rank"));
  EXPECT_THAT(error_of(settings, cpus(3)), HasSubstr("2 entries for 3 ranks"));
  settings.device_memory_bytes = {120 * kMB, 5 * kMB};
  EXPECT_THAT(error_of(settings, cpus(2)), AllOf(HasSubstr("stage 1"), HasSubstr("lacks"),
                                                 HasSubstr("change cluster.device_memory_bytes")));
  settings = mini_settings();
  settings.kv_bytes = {4 << 20};
  EXPECT_THAT(error_of(settings, cpus(2)),
              AllOf(HasSubstr("stage "), HasSubstr("lacks"), HasSubstr("change kv.memory_bytes")));
  settings.layers_per_stage = {6, 6};
  EXPECT_THAT(error_of(settings, cpus(2)), HasSubstr("cluster.layers_per_stage: stage 0"));
}

TEST(PlanTopology, MoreThanADeviceHasIsRefused) {
  RankSettings settings = mini_settings();
  std::vector<DeviceFacts> facts = {{"here", 150 * kMB, 1}, {"here", 150 * kMB, 1}};
  settings.device_memory_bytes = {100 * kMB, 60 * kMB};
  EXPECT_THAT(error_of(settings, facts),
              HasSubstr("cluster.device_memory_bytes: ranks 0, 1 share a device and are given "
                        "160000000 bytes, the device has 150000000"));
  facts[1].id = "there";
  EXPECT_TRUE(plan_topology(settings, mini(), facts).ok());
  settings.device_memory_bytes = {100 * kMB, 160 * kMB};
  EXPECT_THAT(error_of(settings, facts), HasSubstr("rank 1 is given 160000000 bytes"));
  settings.device_memory_bytes.clear();
  settings.kv_bytes = {200 * kMB, 100 * kMB};
  EXPECT_THAT(error_of(settings, facts), HasSubstr("kv.memory_bytes: rank 0 is given"));
}

TEST(DescribeTopology, ShowsTimeKvAndTheTightestStage) {
  RankSettings settings = mini_settings();
  settings.device_memory_bytes = {120 * kMB, 60 * kMB};
  const auto topology = plan_topology(settings, mini(), cpus(2));
  ASSERT_TRUE(topology.ok());
  const auto lines = describe_topology(*topology);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_THAT(lines[0], HasSubstr("plan: stage 0: layers 0-"));
  EXPECT_THAT(lines[0], HasSubstr(" % of the time, weights "));
  std::string all = lines[0] + lines[1];
  EXPECT_EQ(std::count(all.begin(), all.end(), ';'), 2);
  EXPECT_THAT(all,
              AllOf(HasSubstr(" tokens"), HasSubstr("; the tightest"), HasSubstr("; the slowest")));
  const auto unknown = plan_topology(mini_settings(), mini(), cpus(2));
  EXPECT_THAT(describe_topology(*unknown)[0], testing::Not(HasSubstr("KV")));
}

// One thread for each rank; `change` makes rank 1 differ.
std::vector<Result<Topology>> agree(int n_ranks, const std::function<void(RankSettings&)>& change) {
  comm::LocalCluster cluster(n_ranks);
  std::vector<Result<Topology>> results(static_cast<std::size_t>(n_ranks),
                                        Result<Topology>(unavailable("not yet")));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      RankSettings settings = mini_settings();
      settings.device_memory_bytes = {120 * kMB, 60 * kMB, 60 * kMB};
      if (rank == 1) change(settings);
      results[static_cast<std::size_t>(rank)] =
          agree_on_topology(settings, cluster.host(rank), Deadline::after_ms(10000));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

TEST(AgreeOnTopology, AllRanksComeToTheSame) {
  const auto results = agree(3, [](RankSettings&) {});
  const std::vector<int> first = counts_of(results[0]);
  EXPECT_EQ(first.size(), 3u);
  for (const auto& result : results) EXPECT_EQ(counts_of(result), first);
}

TEST(AgreeOnTopology, AnotherModelIsAnErrorOnAllRanks) {
  model::TempDir folder;
  std::ifstream in(std::filesystem::path(mini_model_dir()) / "config.json");
  std::stringstream text;
  text << in.rdbuf();
  std::string config = text.str();
  const std::string was = "\"intermediate_size\": 768";
  ASSERT_NE(config.find(was), std::string::npos);
  config.replace(config.find(was), was.size(), "\"intermediate_size\": 512");
  folder.write("config.json", config);
  for (const auto& result :
       agree(3, [&](RankSettings& settings) { settings.model_dir = folder.path(); })) {
    EXPECT_THAT(result.status().message(),
                AllOf(HasSubstr("rank 1 differs from rank 0 in the model"),
                      HasSubstr("intermediate_size = 768"), HasSubstr("intermediate_size = 512")));
  }
}

TEST(AgreeOnTopology, OtherRangesAreAnErrorOnAllRanks) {
  for (const auto& result : agree(3, [](RankSettings& settings) {
         settings.layers_per_stage = {4, 4, 4};
       })) {
    EXPECT_THAT(result.status().message(),
                HasSubstr("rank 1 differs from rank 0 in the layers of the stages"));
  }
}

TEST(AgreeOnTopology, ARankThatFailsIsNamedEverywhere) {
  for (const auto& result :
       agree(3, [](RankSettings& settings) { settings.model_dir = "/nowhere"; })) {
    EXPECT_THAT(result.status().message(), AllOf(HasSubstr("rank 1"), HasSubstr("/nowhere")));
  }
  for (const auto& result : agree(3, [](RankSettings& settings) {
         settings.kv_bytes = {1 << 20, 1 << 20};
       })) {
    EXPECT_THAT(result.status().message(),
                HasSubstr("rank 1: kv.memory_bytes has 2 entries for 3 ranks"));
  }
}

TEST(ReadDeviceFacts, OfTheCpuAreItsHostsAndItsThreads) {
  RankSettings settings = mini_settings();
  settings.host_memory_bytes = 77;
  settings.n_threads = 3;
  const auto facts = read_device_facts(settings);
  ASSERT_TRUE(facts.ok());
  EXPECT_EQ(facts->id, "here");
  EXPECT_EQ(facts->total_bytes, 77u);
  EXPECT_EQ(facts->speed, 3u);
}

}  // namespace
}  // namespace spindle::worker
