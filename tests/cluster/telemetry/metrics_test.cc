#include "cluster/telemetry/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/cluster/telemetry/exposition.h"

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
  metrics.observe_request({.e2e_seconds = 2.0,
                           .queue_seconds = 0.1,
                           .prefill_seconds = 0.4,
                           .decode_seconds = 1.2,
                           .prompt_tokens = 100,
                           .generation_tokens = 7,
                           .longest_generation_tokens = 5,
                           .n_choices = 2,
                           .max_tokens = 30});
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
  const auto sum = [&](const std::string& name) {
    return value_of(text, "spindle_request_" + name + "_sum{model_name=\"m\"}");
  };
  EXPECT_DOUBLE_EQ(sum("prefill_time_seconds"), 0.4);
  EXPECT_DOUBLE_EQ(sum("decode_time_seconds"), 1.2);
  EXPECT_NEAR(sum("inference_time_seconds"), 1.6, 1e-9);
  EXPECT_NEAR(sum("time_per_output_token_seconds"), 0.2, 1e-9);
  EXPECT_EQ(sum("max_num_generation_tokens"), 5);
  EXPECT_EQ(sum("params_n"), 2);
  EXPECT_EQ(sum("params_max_tokens"), 30);
}

TEST(Metrics, CountsHttpByHandler) {
  Metrics metrics("m");
  metrics.observe_http_request("/tokenize", {0.03, 100, 5000});
  metrics.observe_http_request("/tokenize", {0.3, 300, 70});
  metrics.observe_http_request("/live", {0.0001, 0, 90});
  const std::string text = metrics.render({});
  const std::string labels = "{handler=\"/tokenize\"}";
  EXPECT_EQ(value_of(text, "spindle_http_request_duration_seconds_count" + labels), 2);
  EXPECT_NEAR(value_of(text, "spindle_http_request_duration_seconds_sum" + labels), 0.33, 1e-9);
  EXPECT_EQ(value_of(text, "spindle_http_request_size_bytes_sum" + labels), 400);
  EXPECT_EQ(value_of(text, "spindle_http_response_size_bytes_sum" + labels), 5070);
}

TEST(Metrics, ShowsItsLatencies) {
  Metrics metrics("m");
  metrics.observe_time_to_first_token(0.03);
  metrics.observe_time_to_first_token(5000);
  const LatencyCounts first = metrics.latencies().time_to_first_token;
  ASSERT_EQ(first.counts.size(), first.bounds.size() + 1);
  for (std::size_t i = 0; i < first.bounds.size(); ++i) {
    EXPECT_EQ(first.counts[i], first.bounds[i] >= 0.03 ? 1u : 0u) << first.bounds[i];
  }
  EXPECT_EQ(first.counts.back(), 2u);
  EXPECT_DOUBLE_EQ(first.sum, 5000.03);
  EXPECT_EQ(metrics.latencies().inter_token.counts.back(), 0u);
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

// Stages as a live engine shows them, with as many layers as are asked for.
engine::EngineStats busy_stats(int n_stages, int n_layers) {
  static const std::vector<std::string> kPlans{"FULL raw",
                                               "EVICT lloyd4",
                                               "STREAM raw",
                                               "FULL int4",
                                               "EVICT kivi4",
                                               "FULL token",
                                               "EVICT raw",
                                               "FULL lloyd3/int4",
                                               "EVICT codebook",
                                               "STREAM lloyd2",
                                               ""};
  engine::EngineStats stats;
  stats.accepted = 30;
  stats.finished = 20;
  stats.failed = 1;
  stats.cancelled = 2;
  stats.running = 3;
  stats.waiting = 4;
  stats.balances = true;
  for (int s = 0; s < n_stages; ++s) {
    engine::StageState& stage = stats.stages.emplace_back();
    stage.stage = s;
    stage.device = "cuda:" + std::to_string(s % 8);
    stage.first_layer = s * n_layers;
    stage.n_layers = n_layers;
    stage.kv_capacity_bytes = 1ULL << 36;
    stage.kv_used_bytes = stage.kv_committed_bytes = 123456789012;
    stage.busy_seconds = 1234.56789;
    stage.bubble = {1.25, 2.5, 0.123456789};
    stage.kv_form_bytes.fill(1234567890);
    for (int i = 0; i < n_layers; ++i) {
      stage.layers.push_back({stage.first_layer + i, 1000000007, 4000000007,
                              kPlans[static_cast<std::size_t>(i) % kPlans.size()], 40000, 10001});
    }
  }
  return stats;
}

TEST(Metrics, TextIsWellFormed) {
  MetricsOptions options{.model_name = "a \"name\"\\n", .version = "1.2.3"};
  options.cache_config = {{"policy", "spindle"}};
  options.vllm_names = true;
  Metrics metrics(options);
  metrics.count_http_request("/live", "GET", 200);
  metrics.observe_http_request("/live", {0.1, 1, 2});
  const auto families = testing::parse_exposition(metrics.render(busy_stats(2, 11)));
  EXPECT_GT(families.size(), 80u);
  for (const auto& [name, family] : families) {
    SCOPED_TRACE(name);
    EXPECT_FALSE(family.help.empty());
    EXPECT_TRUE(name.starts_with("spindle_") || name.starts_with("vllm:"));
    const bool counts_iterations = name == "vllm:iteration_tokens_total";  // theirs is named so
    EXPECT_EQ(name.ends_with("_total"), family.type == "counter" || counts_iterations);
    for (const auto& [labels, value] : family.samples) EXPECT_TRUE(std::isfinite(value)) << labels;
    if (family.type != "histogram") continue;
    // Cumulative buckets end in +Inf, which is the count.
    for (const auto& [labels, value] : family.samples) {
      if (!labels.starts_with("_count")) continue;
      const std::string own = labels.substr(6, labels.size() - 7);
      const auto all = family.samples.find("_bucket" + own + ",le=\"+Inf\"}");
      ASSERT_NE(all, family.samples.end()) << labels;
      EXPECT_EQ(all->second, value);
    }
  }
}

TEST(Metrics, AddsStagesUp) {
  engine::EngineStats stats = busy_stats(1, 11);
  engine::StageState& stage = stats.stages[0];
  stage.kv_capacity_bytes = 1000;
  stage.kv_committed_bytes = 800;
  stage.kv_moves_stronger = 3;
  const std::string text = Metrics("m").render(stats);
  const auto of_stage = [&](const std::string& name, const std::string& more = "") {
    return value_of(
        text, "spindle_" + name + "{model_name=\"m\",stage=\"0\",device=\"cuda:0\"" + more + "}");
  };
  EXPECT_EQ(of_stage("kv_pressure_ratio"), 0.8);
  EXPECT_EQ(of_stage("kv_full_bytes"), 11 * 4000000007.0);
  EXPECT_EQ(of_stage("kv_tokens", ",kind=\"logical\""), 40000);
  EXPECT_EQ(of_stage("kv_tokens", ",kind=\"retained\""), 10001);
  EXPECT_EQ(of_stage("kv_stored_bytes", ",repr=\"window\""), 1234567890);
  EXPECT_EQ(of_stage("stage_bubble_seconds_total", ",cause=\"upstream\""), 2.5);
  EXPECT_EQ(of_stage("kv_budget_moves_total", ",direction=\"stronger\""), 3);
  EXPECT_EQ(of_stage("kv_budget_moves_total", ",direction=\"lighter\""), 0);
  EXPECT_EQ(of_stage("kv_layers", ",policy=\"evict_lloyd\""), 1);
  EXPECT_EQ(of_stage("kv_layers", ",policy=\"full_mixed\""), 1);
  EXPECT_EQ(of_stage("kv_layers", ",policy=\"none\""), 1);
  double n_layers = 0;
  for (const auto& [labels, value] :
       testing::parse_exposition(text).at("spindle_kv_layers").samples) {
    n_layers += value;
  }
  EXPECT_EQ(n_layers, 11);
}

TEST(Metrics, CountsStepTokens) {
  engine::EngineStats stats;
  stats.step_tokens.counts[0] = 2;  // steps of one token
  stats.step_tokens.counts[2] = 1;  // one of 9 to 16
  stats.step_tokens.counts.back() = 1;
  stats.step_tokens.sum = 20014;
  const std::string text = Metrics("m").render(stats);
  const auto bucket = [&](const std::string& le) {
    return value_of(text, "spindle_iteration_tokens_bucket{model_name=\"m\",le=\"" + le + "\"}");
  };
  EXPECT_EQ(bucket("1"), 2);
  EXPECT_EQ(bucket("8"), 2);
  EXPECT_EQ(bucket("16"), 3);
  EXPECT_EQ(bucket("16384"), 3);
  EXPECT_EQ(bucket("+Inf"), 4);
  EXPECT_EQ(value_of(text, "spindle_iteration_tokens_sum{model_name=\"m\"}"), 20014);
}

TEST(Metrics, ALargeClusterFitsAMegabyte) {
  MetricsOptions options{.model_name = "a-model-with-a-rather-long-name-70b", .version = "1.2.3"};
  options.vllm_names = true;
  EXPECT_LT(Metrics(options).render(busy_stats(64, 128)).size(), 1'000'000u);
}

// Gateways of Kubernetes look for three gauges: queued, running and the use of the KV cache.
TEST(Metrics, VllmNamesSayTheSame) {
  MetricsOptions options{.model_name = "m", .version = "1"};
  const auto plain = testing::parse_exposition(Metrics(options).render(busy_stats(2, 2)));
  for (const auto& [name, family] : plain) EXPECT_TRUE(name.starts_with("spindle_")) << name;
  options.vllm_names = true;
  options.max_model_len = 2048;
  Metrics metrics(options);
  metrics.observe_time_to_first_token(0.03);
  metrics.observe_request({.e2e_seconds = 3, .prompt_tokens = 3, .generation_tokens = 1});
  metrics.count_finished_choice(FinishedReason::kLength);
  engine::EngineStats stats = busy_stats(2, 2);
  stats.prompt_tokens = 500;
  stats.completed_prompt_tokens = 400;
  const auto families = testing::parse_exposition(metrics.render(stats));
  const auto value = [&](const std::string& name, const std::string& labels) {
    const testing::Family& family = families.at("vllm:" + name);
    const auto found = family.samples.find(labels);
    return found == family.samples.end() ? -1 : found->second;
  };
  const std::string labels = R"({model_name="m",engine="0"})";
  EXPECT_EQ(value("num_requests_running", labels), 3);
  EXPECT_EQ(value("num_requests_waiting", labels), 4);
  EXPECT_NEAR(value("kv_cache_usage_perc", labels), 123456789012.0 / (1ULL << 36), 1e-6);
  EXPECT_EQ(families.at("vllm:num_requests_running").type, "gauge");
  EXPECT_EQ(value("prompt_tokens_total", labels), 400);
  EXPECT_EQ(
      value("request_success_total", R"({model_name="m",finished_reason="length",engine="0"})"), 1);
  EXPECT_EQ(value("time_to_first_token_seconds", R"(_bucket{model_name="m",engine="0",le="0.04"})"),
            1);
  EXPECT_EQ(value("e2e_request_latency_seconds", "_sum" + labels), 3);
  // The series of token counts ends at the longest request.
  EXPECT_EQ(value("request_prompt_tokens", R"(_bucket{model_name="m",engine="0",le="2000"})"), 1);
  EXPECT_EQ(value("request_prompt_tokens", R"(_bucket{model_name="m",engine="0",le="5000"})"), -1);
  for (const auto& [name, family] : families) {
    if (!name.starts_with("vllm:")) continue;
    for (const auto& [sample, v] : family.samples) {
      EXPECT_NE(sample.find("engine=\"0\""), std::string::npos) << name << sample;
    }
  }
}

TEST(Metrics, KnowsWhenTheProcessBegan) {
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  const double began =
      value_of(Metrics("m").render({}), "spindle_process_start_time_seconds{model_name=\"m\"}");
  EXPECT_LE(began, now + 1);
  EXPECT_GT(began, now - 3600);
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
