// How busy two equal stages are while some requests decode and clients that each wait for their
// last prompt send the next: an order that comes late leaves a stage without work. Times are those
// of the 8B shape on two GPUs: reading 16 layers takes 1.85 ms and a token 12 us.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cluster/coordinator/simulation/simulation.h"

namespace spindle::coordinator::simulation {
namespace {

constexpr int kVocabulary = 1000;
constexpr int kDecoding = 16;
constexpr int kMeasured = 60;  // prompts
constexpr std::int64_t kClientUs = 150;

SimulationConfig two_stages() {
  SimulationConfig config;
  config.shape.n_kv_heads = 1;
  config.shape.head_dim = 32;
  for (const double logits : {0.0, 15.0}) {
    config.stages.push_back({.n_layers = 1, .n_pages = 100'000});
    config.latency.push_back({.launch = 100,
                              .weights = 1850,
                              .token = 12.15,
                              .logits = logits,
                              .kv_page = 0.5,
                              .pair = 0,
                              .boundary_token = 0});
  }
  config.link = {.control = 60, .activations = 20, .activations_token = 0.06, .jitter = 0.02};
  config.tokens.vocab_size = kVocabulary;
  config.walks_pages = false;
  SchedulerConfig& scheduler = config.scheduler;
  scheduler.max_num_seqs = 256;
  scheduler.max_num_batched_tokens = 4096;
  scheduler.max_in_flight = 3;
  scheduler.max_num_queued_reqs = 1000;
  scheduler.max_num_queued_tokens = 1'000'000;
  scheduler.limits.vocab_size = kVocabulary;
  scheduler.limits.max_model_len = 2304;
  scheduler.kv_model.n_layers = 2;
  scheduler.kv_model.n_heads = 1;
  scheduler.kv_model.n_kv_heads = 1;
  scheduler.kv_model.head_dim = 32;
  scheduler.kv_model.vocab_size = kVocabulary;
  scheduler.kv_model.max_model_len = 2304;
  return config;
}

engine::EngineRequest request(int n_prompt, int n_output) {
  engine::EngineRequest request;
  for (int i = 0; i < n_prompt; ++i) request.prompt_ids.push_back(20 + i * 37 % 900);
  request.sampling.max_tokens = n_output;
  request.sampling.ignore_eos = true;
  request.sampling.temperature = 0;
  return request;
}

// The busy share of the stage that is less busy, with that many clients.
double busy_share(int n_clients) {
  Simulation simulation(two_stages());
  for (int i = 0; i < kDecoding; ++i) EXPECT_TRUE(simulation.submit(request(1024, 1270)).ok());
  SimulationMetrics from;
  SimulationMetrics to;
  int n_ended = 0;
  const auto send = [&] { EXPECT_TRUE(simulation.submit(request(2048, 1)).ok()); };
  simulation.set_on_end([&](engine::RequestHandle, const Life& life) {
    if (life.request.prompt_ids.size() != 2048) return;
    ++n_ended;
    if (n_ended == n_clients) from = simulation.metrics();
    if (n_ended == n_clients + kMeasured) to = simulation.metrics();
    if (n_ended < n_clients + kMeasured) simulation.clock().after(kClientUs, send);
  });
  simulation.clock().after(1'500'000, [&] {
    for (int i = 0; i < n_clients; ++i) send();
  });
  simulation.run();
  EXPECT_EQ(simulation.violation(), "");
  EXPECT_GE(n_ended, n_clients + kMeasured);
  double least = 1;
  std::string shares;
  for (std::size_t s = 0; s < 2; ++s) {
    const double share = (to.stages[s].busy_us - from.stages[s].busy_us) /
                         static_cast<double>(to.now_us - from.now_us);
    shares += " " + std::to_string(share);
    least = std::min(least, share);
  }
  std::printf("%d prompts at a time: busy%s\n", n_clients, shares.c_str());
  return least;
}

TEST(BusyStages, ClientsThatWaitForTheEndOfAPromptKeepTwoStagesBusy) {
  EXPECT_GT(busy_share(2), 0.95);  // 0.68 with sequences freed by orders of their own
  EXPECT_GT(busy_share(4), 0.95);  // 0.82 with steps that take as much of the prompts as they can
  EXPECT_GT(busy_share(8), 0.95);
}

}  // namespace
}  // namespace spindle::coordinator::simulation
