// What a live engine measures of itself, and that it adds up.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cluster/telemetry/metrics.h"
#include "kvstore/plan/kv_kind.h"
#include "tests/cluster/telemetry/exposition.h"
#include "tests/worker/local_cluster.h"

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

engine::EngineRequest request_of(int n_prompt, int n_output) {
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < n_prompt; ++i) prompt.push_back(300 + i * 131 % 3000);
  engine::EngineRequest request = greedy_request(prompt, n_output);
  request.sampling.ignore_eos = true;
  return request;
}

double seconds_of(const engine::StageState& stage) {
  return stage.busy_seconds + stage.bubble.empty + stage.bubble.upstream + stage.bubble.downstream +
         stage.compress_seconds + stage.send_seconds + stage.receive_seconds;
}

TEST(EngineStats, TheTimesOfAStageAreThoseThatPassed) {
  LocalClusterSettings settings;
  settings.n_stages = 3;
  TestCluster cluster(settings);
  const Clock::time_point began = Clock::now();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 6; ++i) {
    engine::EngineRequest request = request_of(300, 70);
    if (i % 2 == 0) request.kv_policy.profile = kvstore::KvProfile::kInt4;
    sinks.push_back(cluster.submit(std::move(request)));
  }
  for (const auto& sink : sinks) ASSERT_TRUE(sink->wait().status.ok());
  const std::chrono::duration<double> passed = Clock::now() - began;
  const engine::EngineStats stats = cluster.engine().stats();
  ASSERT_EQ(stats.stages.size(), 3u);
  for (const engine::StageState& stage : stats.stages) {
    SCOPED_TRACE(stage.stage);
    // Book-keeping is not among them.
    EXPECT_LE(seconds_of(stage), passed.count() + 0.05);
    EXPECT_GE(seconds_of(stage), 0.5 * passed.count());
    EXPECT_GT(stage.busy_seconds, 0);
    EXPECT_GT(stage.bubble.empty, 0);
    EXPECT_GT(stage.compress_seconds, 0);
    EXPECT_EQ(stage.bubble.upstream > 0, stage.stage > 0);
    EXPECT_EQ(stage.receive_seconds > 0, stage.stage > 0);
    EXPECT_EQ(stage.send_seconds > 0, stage.stage < 2);
    EXPECT_EQ(stage.steps, stats.steps);
    EXPECT_GE(stage.report_age_seconds, 0);
    EXPECT_LE(stage.report_age_seconds, passed.count() + 60);
  }
  EXPECT_EQ(stats.stages[2].bubble.downstream, 0);
  EXPECT_EQ(stats.step_tokens.sum, 6u * (300 + 69));
  EXPECT_EQ(stats.completed_prompt_tokens, 6u * 300);
  EXPECT_EQ(stats.max_num_seqs, 64);
  EXPECT_FALSE(stats.balances);
}

TEST(EngineStats, TimeWithoutRequestsIsNoBubble) {
  TestCluster cluster({});
  ASSERT_TRUE(cluster.generate(request_of(20, 1)).status.ok());
  const double before = cluster.engine().stats().stages[0].bubble.empty;
  const std::chrono::milliseconds pause(400);
  std::this_thread::sleep_for(pause);
  ASSERT_TRUE(cluster.generate(request_of(20, 1)).status.ok());
  const double waited = cluster.engine().stats().stages[0].bubble.empty - before;
  EXPECT_LT(waited, 0.5 * std::chrono::duration<double>(pause).count());
}

TEST(EngineStats, LayersSayWhatIsKept) {
  LocalClusterSettings settings;
  settings.n_stages = 2;
  TestCluster cluster(settings);
  // Kept sequences stay when their requests are over.
  engine::EngineRequest request = request_of(200, 10);
  request.session_id = "kept";
  request.keep_session = true;
  request.kv_policy.profile = kvstore::KvProfile::kInt4;
  ASSERT_TRUE(cluster.generate(request).status.ok());
  // Any step that frees something reports the layers again.
  ASSERT_TRUE(cluster.generate(request_of(20, 1)).status.ok());
  engine::EngineStats stats = cluster.engine().stats();
  int layer_number = 0;
  for (const engine::StageState& stage : stats.stages) {
    ASSERT_EQ(stage.layers.size(), static_cast<std::size_t>(stage.n_layers));
    std::uint64_t layer_bytes = 0;
    for (const engine::LayerState& layer : stage.layers) {
      EXPECT_EQ(layer.layer, layer_number++);
      EXPECT_EQ(layer.plan, "FULL int4");
      EXPECT_EQ(layer.logical_tokens, 209);
      EXPECT_EQ(layer.retained_tokens, 209);  // nothing is dropped
      EXPECT_EQ(layer.full_bytes, 209u * 6144 / 12);
      EXPECT_GT(layer.used_bytes, 0u);
      layer_bytes += layer.used_bytes;
    }
    EXPECT_LE(layer_bytes, stage.kv_used_bytes);
    std::uint64_t form_bytes = 0;
    for (const std::uint64_t bytes : stage.kv_form_bytes) form_bytes += bytes;
    EXPECT_EQ(form_bytes, layer_bytes);
    EXPECT_GT(stage.kv_form_bytes[static_cast<std::size_t>(kvstore::KvForm::kInt4)], 0u);
    EXPECT_EQ(stage.kv_budget_bytes, stage.kv_capacity_bytes / 8192 * 8192);
  }
}

TEST(EngineStats, ListsActiveRequestsInTheirOrder) {
  LocalClusterSettings settings;
  settings.max_num_seqs = 1;
  TestCluster cluster(settings);
  std::vector<engine::RequestHandle> handles(3);
  engine::EngineRequest first = request_of(30, 4000);
  first.kv_policy.profile = kvstore::KvProfile::kInt4;
  const auto running = cluster.submit(first, &handles[0]);
  ASSERT_TRUE(running->wait_tokens(2));
  engine::EngineRequest late = request_of(40, 5);
  late.priority = 7;
  engine::EngineRequest urgent = request_of(50, 6);
  urgent.priority = -7;
  const auto a = cluster.submit(late, &handles[1]);
  const auto b = cluster.submit(urgent, &handles[2]);
  const engine::EngineSnapshot snapshot = cluster.engine().snapshot();
  EXPECT_EQ(snapshot.n_active_requests, 3);
  ASSERT_EQ(snapshot.active_requests.size(), 3u);
  const engine::ActiveRequest& one = snapshot.active_requests[0];
  EXPECT_EQ(one.handle, handles[0]);
  EXPECT_TRUE(one.running);
  EXPECT_EQ(one.prompt_tokens, 30);
  EXPECT_EQ(one.prefilled_tokens, 30);
  EXPECT_GE(one.generated_tokens, 2);
  EXPECT_EQ(one.max_tokens, 4000);
  EXPECT_EQ(one.policy, "int4");
  EXPECT_GT(one.age_us, 0);
  EXPECT_EQ(snapshot.active_requests[1].handle, handles[2]);
  EXPECT_FALSE(snapshot.active_requests[1].running);
  EXPECT_EQ(snapshot.active_requests[1].generated_tokens, 0);
  EXPECT_EQ(snapshot.active_requests[1].max_tokens, 6);
  EXPECT_EQ(snapshot.active_requests[2].handle, handles[1]);
  EXPECT_EQ(snapshot.active_requests[2].priority, 7);
  EXPECT_EQ(snapshot.stats.micro_batches_in_flight, 1);

  EXPECT_FALSE(cluster.engine().cancel(0));
  EXPECT_FALSE(cluster.engine().cancel(handles[2] + 1));
  EXPECT_TRUE(cluster.engine().cancel(handles[2]));
  EXPECT_EQ(b->wait().status.code(), StatusCode::kCancelled);
  EXPECT_FALSE(cluster.engine().cancel(handles[2]));
  EXPECT_TRUE(cluster.engine().cancel(handles[0]));
  EXPECT_EQ(running->wait().status.code(), StatusCode::kCancelled);
  EXPECT_TRUE(a->wait().status.ok());
  EXPECT_FALSE(cluster.engine().cancel(handles[1]));
}

TEST(EngineStats, EveryScrapeAddsUp) {
  LocalClusterSettings settings;
  settings.n_stages = 2;
  settings.max_num_seqs = 3;
  TestCluster cluster(settings);
  const telemetry::Metrics metrics("m");
  std::atomic<bool> done{false};
  std::vector<std::string> scrapes;
  std::thread scraper([&] {
    while (!done) scrapes.push_back(metrics.render(cluster.engine().stats()));
  });
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  std::vector<engine::RequestHandle> handles(12);
  for (std::size_t i = 0; i < handles.size(); ++i) {
    sinks.push_back(cluster.submit(request_of(40, 20), &handles[i]));
  }
  for (std::size_t i = 0; i < handles.size(); i += 4) cluster.engine().cancel(handles[i]);
  for (const auto& sink : sinks) sink->wait();
  done = true;
  scraper.join();
  scrapes.push_back(metrics.render(cluster.engine().stats()));
  double accepted_before = 0;
  for (const std::string& text : scrapes) {
    const auto families = telemetry::testing::parse_exposition(text);
    const auto value = [&](const std::string& name) {
      return families.at("spindle_" + name).samples.at("{model_name=\"m\"}");
    };
    const double accepted = value("requests_accepted_total");
    EXPECT_EQ(accepted, value("requests_finished_total") + value("requests_failed_total") +
                            value("requests_cancelled_total") + value("num_requests_running") +
                            value("num_requests_waiting"));
    EXPECT_GE(accepted, accepted_before);
    accepted_before = accepted;
  }
  EXPECT_EQ(accepted_before, 12);
}

}  // namespace
}  // namespace spindle::worker
