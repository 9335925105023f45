// What `spindle plan` says (cluster/coordinator/sizing.h), against a cluster that runs: the bundled
// model in two stages on the CPU.
//
// Exact: the pools, and how many requests of the full profile are admitted at once when their
// output ends before the first boundary. Otherwise within a request or an eighth: which head keeps
// how much of a compressed prompt depends on the prompt, and requests that have not grown yet leave
// room for another.

#include "cluster/coordinator/sizing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "tests/worker/local_cluster.h"
#include "worker/model/model_shape.h"

namespace spindle::worker {
namespace {

using kvstore::KvPolicy;
using kvstore::KvProfile;

LocalClusterSettings two_stages() {
  LocalClusterSettings settings;
  settings.n_stages = 2;
  settings.max_num_seqs = 32;
  settings.rank.max_model_len = 1024;
  settings.rank.host_name = "here";
  settings.rank.model_dir = mini_model_dir();
  return settings;
}

coordinator::ClusterDescription describe(const LocalClusterSettings& settings) {
  const auto model = model::load_model_config(mini_model_dir());
  EXPECT_TRUE(model.ok()) << model.status().to_string();
  coordinator::ClusterDescription cluster;
  cluster.settings = settings.rank;
  cluster.settings.max_num_seqs = settings.max_num_seqs;
  cluster.model = model::model_shape(*model, false);
  cluster.devices.assign(static_cast<std::size_t>(settings.n_stages), {"here", 0, 1});
  return cluster;
}

void expect_pools(const LocalClusterSettings& settings) {
  const auto sizing = coordinator::size_cluster(describe(settings));
  ASSERT_TRUE(sizing.ok()) << sizing.status().to_string();
  TestCluster cluster(settings);
  const engine::EngineStats stats = cluster.engine().stats();
  ASSERT_EQ(stats.stages.size(), sizing->stages.size());
  for (std::size_t i = 0; i < stats.stages.size(); ++i) {
    const coordinator::StageSizing& planned = sizing->stages[i];
    const engine::StageState& live = stats.stages[i];
    EXPECT_EQ(live.first_layer, planned.predicted.layers.first) << "stage " << i;
    EXPECT_EQ(live.n_layers, planned.predicted.layers.count) << "stage " << i;
    EXPECT_EQ(live.kv_capacity_bytes,
              static_cast<std::uint64_t>(planned.capacity.n_pages) * sizing->shape.page_bytes())
        << "stage " << i;
    // Small tables beside the matrices are not counted.
    EXPECT_NEAR(static_cast<double>(planned.predicted.weight_bytes),
                static_cast<double>(live.weight_bytes),
                0.02 * static_cast<double>(live.weight_bytes));
  }
}

TEST(SizingOfALiveCluster, PoolsAreTheSame) {
  LocalClusterSettings settings = two_stages();
  expect_pools(settings);  // what max_num_seqs sequences need
  settings.rank.device_memory_bytes = {50'000'000, 30'000'000};
  expect_pools(settings);
  settings.rank.kv_bytes = {9'000'001, 5'000'000};
  expect_pools(settings);
  settings.rank.device_memory_bytes.clear();
  settings.rank.layers_per_stage = {4, 8};
  settings.rank.kv_bytes = {12'345'678};
  expect_pools(settings);
}

// Counts tokens.
class CountingSink final : public engine::EventSink {
 public:
  void on_tokens(std::span<const engine::TokenEvent> events) override {
    n_tokens_ += static_cast<std::int64_t>(events.size());
  }
  void on_end(const Status&, const engine::RequestSummary&) override { has_ended_ = true; }

  std::int64_t n_tokens() const { return n_tokens_; }
  bool has_ended() const { return has_ended_; }

 private:
  std::atomic<std::int64_t> n_tokens_ = 0;
  std::atomic<bool> has_ended_ = false;
};

struct Ran {
  std::uint64_t at_once = 0;
  std::uint64_t preemptions = 0;
};

// Submits n requests of that kind together, and looks how many run as long as none can have ended:
// those that did count until their stages have freed them.
Ran run(const LocalClusterSettings& settings, const coordinator::RequestKind& kind,
        std::int64_t n) {
  TestCluster cluster(settings);
  std::vector<std::shared_ptr<CountingSink>> sinks;
  for (std::int64_t i = 0; i < n; ++i) {
    std::vector<std::int32_t> prompt;
    for (std::int64_t p = 0; p < kind.prompt_tokens; ++p) {
      prompt.push_back(static_cast<std::int32_t>(3 + (p * 37 + i * 101 + p * p % 211) % 4000));
    }
    engine::EngineRequest request =
        greedy_request(std::move(prompt), static_cast<int>(kind.output_tokens));
    request.sampling.ignore_eos = true;
    request.kv_policy = kind.policy;
    sinks.push_back(std::make_shared<CountingSink>());
    const auto handle = cluster.engine().submit(std::move(request), sinks.back());
    EXPECT_TRUE(handle.ok()) << handle.status().to_string();
  }
  // A token and its event are at most a step of each stage apart.
  const std::int64_t last_safe = kind.output_tokens - 4;
  Ran ran;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (std::chrono::steady_clock::now() < deadline) {
    const engine::EngineStats stats = cluster.engine().stats();
    ran.preemptions = stats.preemptions;
    for (const auto& sink : sinks) {
      if (sink->n_tokens() >= last_safe || sink->has_ended()) return ran;
    }
    ran.at_once = std::max(ran.at_once, static_cast<std::uint64_t>(stats.running));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  ADD_FAILURE() << "no request came to its end";
  return ran;
}

std::int64_t planned_at_once(const LocalClusterSettings& settings,
                             const coordinator::RequestKind& kind) {
  const coordinator::ClusterDescription cluster = describe(settings);
  const auto sizing = coordinator::size_cluster(cluster);
  EXPECT_TRUE(sizing.ok()) << sizing.status().to_string();
  const auto requests = coordinator::size_requests(cluster, *sizing, kind);
  EXPECT_TRUE(requests.ok()) << requests.status().to_string();
  return requests->concurrency;
}

LocalClusterSettings small_pools() {
  LocalClusterSettings settings = two_stages();
  settings.rank.max_model_len = 512;
  settings.rank.kv_bytes = {10'000'000, 7'500'000};
  return settings;
}

TEST(SizingOfALiveCluster, SoManyAreAdmittedAtOnce) {
  const coordinator::RequestKind kind{.prompt_tokens = 320, .output_tokens = 64, .policy = {}};
  const std::int64_t planned = planned_at_once(small_pools(), kind);
  ASSERT_GE(planned, 4);
  const Ran ran = run(small_pools(), kind, planned + 4);
  EXPECT_EQ(ran.at_once, static_cast<std::uint64_t>(planned));
  EXPECT_EQ(ran.preemptions, 0u);
}

TEST(SizingOfALiveCluster, OfCompressedRequestsAboutAsMany) {
  for (const KvPolicy& policy :
       {KvPolicy{.profile = KvProfile::kInt4, .best_effort = true},
        KvPolicy{.profile = KvProfile::kSpindle, .ratio = 0.3, .best_effort = true}}) {
    SCOPED_TRACE(std::string(kvstore::profile_name(policy.profile)));
    const coordinator::RequestKind kind{
        .prompt_tokens = 384, .output_tokens = 100, .policy = policy};
    const std::int64_t planned = planned_at_once(small_pools(), kind);
    ASSERT_GE(planned, 5);
    const Ran ran = run(small_pools(), kind, planned + 4);
    const double tolerance = std::max(1.0, static_cast<double>(planned) / 8);
    EXPECT_NEAR(static_cast<double>(ran.at_once), static_cast<double>(planned), tolerance);
    EXPECT_EQ(ran.preemptions, 0u);
  }
}

}  // namespace
}  // namespace spindle::worker
