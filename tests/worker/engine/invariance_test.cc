// Seeded sampling with every option on: the tokens are a function of the request alone.

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "tests/worker/local_cluster.h"

namespace spindle::worker {
namespace {

std::vector<engine::EngineRequest> sampled_requests(int n) {
  const std::vector<GoldenGreedy> prompts = load_golden_greedy(1000);
  std::vector<engine::EngineRequest> requests;
  for (int i = 0; i < n; ++i) {
    const std::vector<std::int32_t>& prompt = prompts[static_cast<std::size_t>(i) % 2].prompt;
    engine::EngineRequest request;
    // Prompts of different lengths, so that requests join and leave at different steps.
    request.prompt_ids.assign(prompt.begin(), prompt.begin() + 40 + (i * 37) % 24);
    engine::SamplingParams& p = request.sampling;
    p.temperature = 0.9F;
    p.top_k = 200;
    p.top_p = 0.95F;
    p.min_p = 0.01F;
    p.repetition_penalty = 1.1F;
    p.presence_penalty = 0.2F;
    p.frequency_penalty = 0.1F;
    p.logit_bias = {{17, 2.0F}};
    p.has_seed = true;
    p.seed = 100 + static_cast<std::uint64_t>(i);
    p.max_tokens = 10 + i % 9;
    p.min_tokens = 3;
    p.n_choices = 1 + i % 3;
    requests.push_back(std::move(request));
  }
  return requests;
}

std::vector<std::vector<std::vector<std::int32_t>>> run_all(int n_stages, int chunk, int at_once,
                                                            int micro_batches,
                                                            bool begins_early = false,
                                                            bool recv_waits = false) {
  LocalClusterSettings settings;
  settings.n_stages = n_stages;
  settings.rank.max_num_batched_tokens = chunk;
  settings.micro_batches = micro_batches;
  settings.begins_early = begins_early;
  settings.recv_waits = recv_waits;
  TestCluster cluster(settings);
  std::vector<std::vector<std::vector<std::int32_t>>> tokens;
  const std::vector<engine::EngineRequest> requests = sampled_requests(16);
  for (std::size_t begin = 0; begin < requests.size(); begin += static_cast<std::size_t>(at_once)) {
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (std::size_t i = begin; i < begin + static_cast<std::size_t>(at_once); ++i) {
      sinks.push_back(cluster.submit(requests[i]));
    }
    for (const auto& sink : sinks) {
      const Generated generated = sink->wait();
      EXPECT_TRUE(generated.status.ok()) << generated.status.to_string();
      tokens.push_back(generated.tokens);
    }
  }
  EXPECT_EQ(cluster.n_early() > 0, begins_early && !recv_waits);
  return tokens;
}

TEST(Invariance, SampledTokensDoNotDependOnStagesBatchOrChunks) {
  const auto reference = run_all(1, 512, 1, 1);
  ASSERT_EQ(reference.size(), 16u);
  // The test would prove little if all outputs were alike.
  EXPECT_NE(reference[0][0], reference[6][0]);
  EXPECT_NE(reference[2][0], reference[2][1]);
  EXPECT_EQ(run_all(2, 512, 4, 0), reference);
  EXPECT_EQ(run_all(3, 64, 16, 0), reference);
  EXPECT_EQ(run_all(4, 7, 16, 8), reference);
  EXPECT_EQ(run_all(1, 8192, 16, 1), reference);
  EXPECT_EQ(run_all(2, 16, 16, 0, true), reference);
  EXPECT_EQ(run_all(3, 64, 16, 8, true), reference);
  EXPECT_EQ(run_all(2, 16, 16, 0, true, true), reference);
}

TEST(Invariance, RequestsWithoutASeedDiffer) {
  TestCluster cluster({});
  engine::EngineRequest request = sampled_requests(1)[0];
  request.sampling.has_seed = false;
  request.sampling.max_tokens = 20;
  request.sampling.min_tokens = 20;
  const Generated first = cluster.generate(request);
  const Generated second = cluster.generate(request);
  EXPECT_NE(first.tokens, second.tokens);
}

}  // namespace
}  // namespace spindle::worker
