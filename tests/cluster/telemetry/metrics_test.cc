#include "cluster/telemetry/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace spindle::telemetry {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// The value of a sample line, by its name and labels as written.
double value_of(const std::string& text, const std::string& sample) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(sample + " ")) return std::stod(line.substr(sample.size() + 1));
  }
  ADD_FAILURE() << "no sample " << sample << " in\n" << text;
  return -1;
}

TEST(Metrics, TakesRequestCountsFromOneSnapshot) {
  const Metrics metrics("m");
  engine::EngineStats stats;
  stats.running = 3;
  stats.waiting = 4;
  stats.finished = 20;
  stats.failed = 1;
  stats.cancelled = 2;
  stats.accepted = 30;
  stats.prompt_tokens = 1000;
  stats.generation_tokens = 2000;
  const std::string text = metrics.render(stats);
  const auto count = [&](const std::string& name) {
    return value_of(text, "spindle_" + name + "{model_name=\"m\"}");
  };
  EXPECT_EQ(count("requests_accepted_total"), 30);
  EXPECT_EQ(count("requests_accepted_total"),
            count("requests_finished_total") + count("requests_failed_total") +
                count("requests_cancelled_total") + count("num_requests_running") +
                count("num_requests_waiting"));
  EXPECT_EQ(count("prompt_tokens_total"), 1000);
  EXPECT_EQ(count("generation_tokens_total"), 2000);
}

TEST(Metrics, LabelsStages) {
  const Metrics metrics("m");
  engine::EngineStats stats;
  stats.stages.resize(2);
  stats.stages[0].device = "cpu";
  stats.stages[0].kv_capacity_bytes = 1000;
  stats.stages[0].kv_used_bytes = 500;
  stats.stages[1].stage = 1;
  stats.stages[1].device = "cuda:0";
  stats.stages[1].kv_capacity_bytes = 400;
  stats.stages[1].kv_used_bytes = 300;
  stats.stages[1].kv_peak_bytes = 350;
  stats.stages[1].busy_seconds = 1.5;
  const std::string text = metrics.render(stats);
  const auto at_one = [&](const std::string& name) {
    return value_of(text, "spindle_" + name + "{model_name=\"m\",stage=\"1\",device=\"cuda:0\"}");
  };
  EXPECT_EQ(at_one("kv_capacity_bytes"), 400);
  EXPECT_EQ(at_one("kv_used_bytes"), 300);
  EXPECT_EQ(at_one("kv_peak_bytes"), 350);
  EXPECT_EQ(at_one("stage_busy_seconds_total"), 1.5);
  EXPECT_EQ(value_of(text, "spindle_kv_cache_usage_perc{model_name=\"m\"}"), 0.75);
}

TEST(Metrics, CountsAndObserves) {
  Metrics metrics("m");
  metrics.count_refused(RefusalReason::kQueueFull);
  metrics.count_finished_choice(FinishedReason::kLength);
  metrics.count_finished_choice(FinishedReason::kLength);
  metrics.observe_time_to_first_token(0.03);
  metrics.observe_inter_token_latency(0.02);
  metrics.observe_request(2.0, 0.1, 100, 7);
  const std::string text = metrics.render({});
  EXPECT_EQ(
      value_of(text, "spindle_requests_refused_total{model_name=\"m\",reason=\"queue_full\"}"), 1);
  EXPECT_EQ(value_of(text, "spindle_requests_refused_total{model_name=\"m\",reason=\"invalid\"}"),
            0);
  EXPECT_EQ(
      value_of(text, "spindle_request_success_total{model_name=\"m\",finished_reason=\"length\"}"),
      2);
  const auto bucket = [&](const std::string& name, const std::string& le) {
    return value_of(text, "spindle_" + name + "_bucket{model_name=\"m\",le=\"" + le + "\"}");
  };
  EXPECT_EQ(bucket("time_to_first_token_seconds", "0.02"), 0);
  EXPECT_EQ(bucket("time_to_first_token_seconds", "0.04"), 1);
  EXPECT_EQ(bucket("time_to_first_token_seconds", "+Inf"), 1);
  EXPECT_EQ(bucket("inter_token_latency_seconds", "0.025"), 1);
  EXPECT_EQ(bucket("e2e_request_latency_seconds", "1.5"), 0);
  EXPECT_EQ(bucket("e2e_request_latency_seconds", "2"), 1);
  EXPECT_EQ(bucket("request_prompt_tokens", "100"), 1);
  EXPECT_EQ(bucket("request_generation_tokens", "5"), 0);
  EXPECT_EQ(bucket("request_generation_tokens", "10"), 1);
  EXPECT_EQ(value_of(text, "spindle_request_queue_time_seconds_sum{model_name=\"m\"}"), 0.1);
}

TEST(Metrics, BoundsItsLabels) {
  Metrics metrics("m");
  for (int i = 0; i < 100; ++i) {
    metrics.count_http_request("/live", "METHOD" + std::to_string(i), 200 + i % 5);
    metrics.count_http_request("/live", "GET", 9999);
  }
  const std::string text = metrics.render({});
  EXPECT_EQ(
      value_of(text,
               "spindle_http_requests_total{handler=\"/live\",method=\"other\",status=\"2xx\"}"),
      100);
  EXPECT_THAT(text, HasSubstr("status=\"other\"} 100"));
  EXPECT_THAT(text, Not(HasSubstr("METHOD")));
}

TEST(Metrics, KeepsServersApart) {
  Metrics first("m");
  const Metrics second("m");
  first.count_refused(RefusalReason::kInvalid);
  const std::string sample = "spindle_requests_refused_total{model_name=\"m\",reason=\"invalid\"}";
  EXPECT_EQ(value_of(first.render({}), sample), 1);
  EXPECT_EQ(value_of(second.render({}), sample), 0);
}

TEST(Metrics, WritesHelpAndTypeOncePerFamily) {
  const std::string text = Metrics("m").render({});
  std::vector<std::string> seen;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("# TYPE ")) seen.push_back(line);
  }
  EXPECT_GT(seen.size(), 15u);
  std::vector<std::string> unique = seen;
  std::sort(unique.begin(), unique.end());
  EXPECT_EQ(std::unique(unique.begin(), unique.end()), unique.end());
}

TEST(Metrics, CountsFromManyThreads) {
  Metrics metrics("m");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&metrics] {
      for (int i = 0; i < 1000; ++i) {
        metrics.observe_inter_token_latency(0.01);
        metrics.count_http_request("/live", "GET", 200);
        if (i % 100 == 0) metrics.render({});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::string text = metrics.render({});
  EXPECT_EQ(value_of(text, "spindle_inter_token_latency_seconds_count{model_name=\"m\"}"), 4000);
  EXPECT_EQ(
      value_of(text,
               "spindle_http_requests_total{handler=\"/live\",method=\"GET\",status=\"2xx\"}"),
      4000);
}

}  // namespace
}  // namespace spindle::telemetry
