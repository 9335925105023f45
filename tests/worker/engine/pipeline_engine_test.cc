#include "worker/engine/pipeline_engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/worker/local_cluster.h"

namespace spindle::worker {
namespace {

engine::EngineRequest endless(int max_tokens) {
  engine::EngineRequest request = greedy_request(load_golden_greedy(64)[0].prompt, max_tokens);
  request.sampling.ignore_eos = true;
  return request;
}

void expect_books_balance(const engine::EngineStats& stats) {
  EXPECT_EQ(stats.accepted, stats.finished + stats.failed + stats.cancelled +
                                static_cast<std::uint64_t>(stats.running + stats.waiting));
}

TEST(PipelineEngine, CancelTakesEffectAndFreesEveryPage) {
  LocalClusterSettings settings;
  settings.n_stages = 3;
  TestCluster cluster(settings);
  engine::RequestHandle handle = 0;
  const auto sink = cluster.submit(endless(4000), &handle);
  ASSERT_TRUE(sink->wait_tokens(3));
  cluster.engine().cancel(handle);
  const Generated generated = sink->wait();
  EXPECT_EQ(generated.status.code(), StatusCode::kCancelled);
  EXPECT_LT(generated.tokens[0].size(), 3000u);
  const engine::EngineStats stats = cluster.engine().stats();
  EXPECT_EQ(stats.cancelled, 1u);
  EXPECT_EQ(stats.running, 0);
  for (const engine::StageState& stage : stats.stages) EXPECT_EQ(stage.kv_used_bytes, 0u);
  expect_books_balance(stats);
}

TEST(PipelineEngine, CancelDuringPrefill) {
  LocalClusterSettings settings;
  settings.n_stages = 2;
  settings.rank.max_num_batched_tokens = 16;
  TestCluster cluster(settings);
  const std::vector<GoldenGreedy> golden = load_golden_greedy(3000);
  engine::RequestHandle handle = 0;
  const auto sink = cluster.submit(greedy_request(golden[3].prompt, 8), &handle);
  while (cluster.engine().stats().steps < 4) std::this_thread::yield();
  cluster.engine().cancel(handle);
  EXPECT_EQ(sink->wait().status.code(), StatusCode::kCancelled);
  // The cluster goes on serving.
  const Generated after = cluster.generate(greedy_request(golden[0].prompt, 32));
  EXPECT_EQ(after.tokens[0], golden[0].output);
}

TEST(PipelineEngine, CancelOfAWaitingRequestNeedsNoStep) {
  LocalClusterSettings settings;
  settings.max_num_seqs = 1;
  TestCluster cluster(settings);
  engine::RequestHandle first = 0;
  engine::RequestHandle second = 0;
  const auto running = cluster.submit(endless(4000), &first);
  ASSERT_TRUE(running->wait_tokens(1));
  const auto waiting = cluster.submit(endless(10), &second);
  EXPECT_EQ(cluster.engine().stats().waiting, 1);
  cluster.engine().cancel(second);
  EXPECT_EQ(waiting->wait().status.code(), StatusCode::kCancelled);
  EXPECT_EQ(running->n_ends(), 0);
  cluster.engine().cancel(first);
  running->wait();
  expect_books_balance(cluster.engine().stats());
}

TEST(PipelineEngine, FinishChoiceEndsOneChoiceAsStopped) {
  TestCluster cluster({});
  engine::EngineRequest request = endless(400);
  request.sampling.n_choices = 2;
  request.sampling.temperature = 0.8F;
  engine::RequestHandle handle = 0;
  const auto sink = cluster.submit(request, &handle);
  ASSERT_TRUE(sink->wait_tokens(4));
  cluster.engine().finish_choice(handle, 0);
  const Generated generated = sink->wait();
  EXPECT_TRUE(generated.status.ok());
  EXPECT_LT(generated.tokens[0].size(), 400u);
  EXPECT_EQ(generated.tokens[1].size(), 400u);
}

TEST(PipelineEngine, AFullQueueRefuses) {
  LocalClusterSettings settings;
  settings.max_num_seqs = 1;
  settings.max_num_queued_reqs = 2;
  TestCluster cluster(settings);
  std::vector<engine::RequestHandle> handles(3);
  const auto running = cluster.submit(endless(4000), &handles[0]);
  ASSERT_TRUE(running->wait_tokens(1));
  const auto a = cluster.submit(endless(5), &handles[1]);
  const auto b = cluster.submit(endless(5), &handles[2]);
  EXPECT_EQ(cluster.engine().admission().code(), StatusCode::kResourceExhausted);
  const auto refused = cluster.submit(endless(5));
  EXPECT_EQ(refused->wait().status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(cluster.engine().stats().refused, 1u);
  cluster.engine().cancel(handles[0]);
  EXPECT_EQ(a->wait().tokens[0].size(), 5u);
  EXPECT_EQ(b->wait().tokens[0].size(), 5u);
}

TEST(PipelineEngine, DrainFinishesWhatRunsAndRefusesTheRest) {
  TestCluster cluster({});
  const auto sink = cluster.submit(endless(50));
  ASSERT_TRUE(sink->wait_tokens(1));
  EXPECT_TRUE(cluster.engine().drain(Deadline::after_ms(60000)).ok());
  EXPECT_EQ(sink->wait().tokens[0].size(), 50u);
  EXPECT_EQ(cluster.submit(endless(5))->wait().status.code(), StatusCode::kUnavailable);
}

TEST(PipelineEngine, DrainCancelsAtItsDeadline) {
  TestCluster cluster({});
  const auto sink = cluster.submit(endless(7000));
  ASSERT_TRUE(sink->wait_tokens(1));
  EXPECT_EQ(cluster.engine().drain(Deadline::after_ms(50)).code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(sink->wait().status.code(), StatusCode::kCancelled);
}

TEST(PipelineEngine, StopEndsEveryRequest) {
  TestCluster cluster({});
  const auto sink = cluster.submit(endless(7000));
  ASSERT_TRUE(sink->wait_tokens(1));
  cluster.stop();
  EXPECT_EQ(sink->wait().status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(sink->n_ends(), 1);
}

TEST(PipelineEngine, LogprobsAreOrderedAndContainTheGreedyChoice) {
  TestCluster cluster({});
  engine::EngineRequest request = endless(6);
  request.sampling.n_logprobs = 5;
  const Generated generated = cluster.generate(request);
  ASSERT_EQ(generated.events[0].size(), 6u);
  for (const engine::TokenEvent& event : generated.events[0]) {
    ASSERT_TRUE(event.has_logprob);
    ASSERT_EQ(event.top.size(), 5u);
    EXPECT_EQ(event.top[0].id, event.token);
    EXPECT_FLOAT_EQ(event.top[0].logprob, event.logprob);
    for (std::size_t i = 1; i < 5; ++i) EXPECT_LE(event.top[i].logprob, event.top[i - 1].logprob);
    EXPECT_LE(event.logprob, 0.0F);
  }
}

TEST(PipelineEngine, MinTokensHoldsBackTheEndOfSequence) {
  TestCluster cluster({});
  for (const GoldenGreedy& golden : load_golden_greedy(700)) {
    if (!golden.ends_with_eos) continue;
    engine::EngineRequest request = greedy_request(golden.prompt, 32);
    request.sampling.min_tokens = static_cast<int>(golden.output.size()) + 3;
    const Generated generated = cluster.generate(request);
    EXPECT_GE(generated.tokens[0].size(), golden.output.size() + 3);
    EXPECT_TRUE(
        std::equal(golden.output.begin(), golden.output.end(), generated.tokens[0].begin()));
  }
}

TEST(PipelineEngine, StopTokenIdsEndAChoice) {
  TestCluster cluster({});
  const GoldenGreedy golden = load_golden_greedy(64)[0];
  engine::EngineRequest request = greedy_request(golden.prompt, 32);
  request.sampling.stop_token_ids = {golden.output[5]};
  const Generated generated = cluster.generate(request);
  EXPECT_EQ(generated.tokens[0],
            std::vector<std::int32_t>(golden.output.begin(), golden.output.begin() + 5));
  EXPECT_EQ(generated.ends_with[0], engine::FinishReason::kStop);
}

TEST(PipelineEngine, TheContextEndsAChoice) {
  LocalClusterSettings settings;
  settings.rank.max_model_len = 70;
  TestCluster cluster(settings);
  const Generated generated = cluster.generate(endless(32));
  EXPECT_EQ(generated.tokens[0].size(), 6u);
  EXPECT_EQ(generated.ends_with[0], engine::FinishReason::kLength);
}

TEST(PipelineEngine, SummaryReportsKvOfEveryStage) {
  LocalClusterSettings settings;
  settings.n_stages = 2;
  TestCluster cluster(settings);
  const Generated generated = cluster.generate(endless(10));
  ASSERT_EQ(generated.summary.kv.size(), 2u);
  std::uint64_t full = 0;
  for (const engine::StageKvUse& use : generated.summary.kv) {
    full += use.full_bytes;
    EXPECT_GE(use.kept_bytes, use.full_bytes);  // whole pages
    EXPECT_LE(use.kept_bytes, use.full_bytes * 96 / 73);
  }
  EXPECT_EQ(full, 73u * 6144u);  // 64 + 10 tokens, the last one never cached
  EXPECT_GT(generated.summary.time_to_first_token_ms, 0);
  EXPECT_GE(generated.summary.total_ms, generated.summary.time_to_first_token_ms);
}

TEST(PipelineEngine, PoolOfOneSequenceServesManyInTurn) {
  LocalClusterSettings settings;
  settings.n_stages = 2;
  settings.rank.max_model_len = 256;
  settings.rank.layers_per_stage = {7, 5};
  settings.rank.kv_bytes = {8LL * 7 * 2 * 8192};  // 8 pages a head for 7 layers: 256 tokens
  TestCluster cluster(settings);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 12; ++i) sinks.push_back(cluster.submit(endless(20 + i)));
  for (int i = 0; i < 12; ++i) {
    const Generated generated = sinks[static_cast<std::size_t>(i)]->wait();
    EXPECT_TRUE(generated.status.ok()) << generated.status.to_string();
    EXPECT_EQ(generated.tokens[0].size(), 20u + static_cast<std::size_t>(i));
  }
}

// Requests of mixed lengths and policies, all at once: what each of them says.
std::vector<std::vector<std::int32_t>> outputs_of_all(TestCluster& cluster, unsigned seed) {
  constexpr int kRequests = 96;
  std::mt19937 random(seed);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < kRequests; ++i) {
    std::vector<std::int32_t> prompt(16 + random() % 160);
    for (std::int32_t& id : prompt) id = 300 + static_cast<std::int32_t>(random() % 3000);
    engine::EngineRequest request =
        greedy_request(prompt, 20 + static_cast<std::int32_t>(random() % 300));
    request.sampling.ignore_eos = true;
    request.sampling.temperature = random() % 2 == 0 ? 0.0F : 0.9F;
    request.sampling.has_seed = true;
    request.sampling.seed = random();
    if (random() % 2 == 0) request.kv_policy.profile = kvstore::KvProfile::kInt4;
    request.priority = static_cast<std::int32_t>(random() % 3) - 1;
    sinks.push_back(cluster.submit(std::move(request)));
  }
  std::vector<std::vector<std::int32_t>> outputs;
  for (const auto& sink : sinks) {
    const Generated generated = sink->wait();
    EXPECT_TRUE(generated.status.ok()) << generated.status.to_string();
    outputs.push_back(generated.tokens[0]);
  }
  return outputs;
}

TEST(PipelineEngine, APoolForAFifthOfWhatIsAskedChangesNoOutput) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  LocalClusterSettings settings;
  settings.n_stages = 2;
  settings.max_num_seqs = 96;
  settings.rank.max_num_batched_tokens = 256;
  settings.rank.max_model_len = 512;
  TestCluster roomy(settings);
  const auto expected = outputs_of_all(roomy, seed);
  EXPECT_EQ(roomy.engine().stats().preemptions, 0u);
  std::int64_t peak = 0;
  for (const engine::StageState& stage : roomy.engine().stats().stages) {
    peak = std::max(peak, static_cast<std::int64_t>(stage.kv_peak_bytes));
  }
  roomy.stop();
  settings.rank.kv_bytes = {peak / 5};
  settings.begins_early = true;
  TestCluster tight(settings);
  EXPECT_EQ(outputs_of_all(tight, seed), expected);
  const engine::EngineStats stats = tight.engine().stats();
  EXPECT_GT(stats.preemptions, 0u);
  EXPECT_EQ(stats.failed, 0u);
  expect_books_balance(stats);
  for (const engine::StageState& stage : stats.stages) EXPECT_EQ(stage.kv_used_bytes, 0u);
}

// Stages of unequal memory under load: levels move, and every request is answered.
TEST(PipelineEngine, BudgetsMoveWhileRequestsRun) {
  LocalClusterSettings settings;
  settings.n_stages = 3;
  settings.max_num_seqs = 64;
  settings.rank.max_num_batched_tokens = 256;
  settings.rank.max_model_len = 1024;
  settings.rank.layers_per_stage = {4, 4, 4};
  settings.rank.kv_bytes = {12 << 20, 4 << 20, 12 << 20};
  settings.balances = true;
  settings.begins_early = true;
  TestCluster cluster(settings);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 40; ++i) {
    std::vector<std::int32_t> prompt(600);
    for (std::size_t t = 0; t < prompt.size(); ++t) {
      prompt[t] =
          300 + static_cast<std::int32_t>((t * 131 + static_cast<std::size_t>(i) * 17) % 3000);
    }
    engine::EngineRequest request = greedy_request(prompt, 100);
    request.sampling.ignore_eos = true;
    request.kv_policy = balanced_policy();
    sinks.push_back(cluster.submit(std::move(request)));
  }
  for (const auto& sink : sinks) {
    const Generated generated = sink->wait();
    EXPECT_TRUE(generated.status.ok()) << generated.status.to_string();
    EXPECT_EQ(generated.tokens[0].size(), 100u);
  }
  const engine::EngineStats stats = cluster.engine().stats();
  EXPECT_GT(stats.budget_rounds, 2u);
  EXPECT_GT(stats.budget_plans, 0u);
  const engine::EngineSnapshot snapshot = cluster.engine().snapshot();
  ASSERT_FALSE(snapshot.moves.empty());
  std::uint64_t n_stronger = 0;
  // At the end, when few requests are left, the stage may be back at 0.3: that depends on how long
  // they take.
  double strongest = 0.3;
  for (const engine::BudgetMove& move : snapshot.moves) {
    strongest = std::min(strongest, move.to_ratio);
    EXPECT_EQ(move.stage, 1);
    EXPECT_NE(move.from_ratio, move.to_ratio);
    EXPECT_FALSE(move.reason.empty());
    EXPECT_GT(move.step, 0u);
    n_stronger += move.to_ratio < move.from_ratio ? 1 : 0;
  }
  EXPECT_DOUBLE_EQ(snapshot.moves[0].from_ratio, 0.3);
  EXPECT_LT(strongest, 0.3);
  EXPECT_EQ(stats.stages[1].kv_moves_stronger, n_stronger);
  EXPECT_EQ(stats.stages[1].kv_moves_lighter, snapshot.moves.size() - n_stronger);
  EXPECT_TRUE(stats.balances);
  for (const engine::StageState& stage : stats.stages) EXPECT_GT(stage.kv_budget_bytes, 0u);
}

}  // namespace
}  // namespace spindle::worker
