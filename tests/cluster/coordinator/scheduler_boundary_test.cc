// Boundaries: prompts and answers under a KV policy, against simulated stages.

#include <array>

#include "tests/cluster/coordinator/simulated_stages.h"

namespace spindle::coordinator {
namespace {

using kvstore::KvProfile;

const std::vector<StageCapacity> kStages = {{2, 400}, {1, 250}};

engine::EngineRequest policy_request(int n_prompt, int max_tokens, KvProfile profile,
                                     int n_choices = 1) {
  engine::EngineRequest request = request_of(n_prompt, max_tokens, n_choices);
  request.kv_policy.profile = profile;
  request.sampling.ignore_eos = true;
  return request;
}

TEST(SchedulerBoundary, NothingRunsBetweenABoundaryAndItsPlan) {
  SchedulerConfig config = kv_config(3);
  config.max_num_batched_tokens = 800;  // the prompt comes in two parts
  Driver driver(config, kStages);
  ASSERT_TRUE(driver.submit(policy_request(150, 10, KvProfile::kKivi4)).ok());
  const auto first = driver.step();
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(first->open(0).boundaries_size(), 1);
  EXPECT_EQ(first->open(0).boundaries(0), 150);
  EXPECT_EQ(first->open(0).reserve_pages_size(), 2);
  const auto second = driver.step();  // reaches the boundary
  ASSERT_TRUE(second.has_value());
  EXPECT_TRUE(second->runs(0).sample());
  EXPECT_FALSE(driver.step().has_value());
  driver.deliver(0);
  driver.deliver(0);
  driver.deliver(1);
  EXPECT_FALSE(driver.step().has_value()) << "the last stage has not reported its scores";
  driver.deliver(1);
  EXPECT_EQ(driver.lives().begin()->second.tokens[0].size(), 1u) << "the first token is out";
  const auto third = driver.step();
  ASSERT_TRUE(third.has_value());
  ASSERT_EQ(third->compress_size(), 1);
  EXPECT_EQ(third->compress(0).n_tokens(), 150);
  EXPECT_EQ(third->compress(0).heads_size(), 3);
  EXPECT_TRUE(third->compress(0).selects());
  EXPECT_EQ(third->compress(0).prompt_left(), 0);
  EXPECT_FALSE(third->compress(0).forks());
  ASSERT_EQ(third->runs_size(), 1);
  EXPECT_EQ(third->runs(0).first_position(), 150);
  driver.deliver_all();
  driver.run();
  const Life& life = driver.lives().begin()->second;
  EXPECT_TRUE(life.status.ok());
  EXPECT_EQ(life.tokens.at(0).size(), 10u);
  ASSERT_EQ(life.summary.boundaries.size(), 1u);
  const engine::BoundaryUse& use = life.summary.boundaries[0];
  EXPECT_EQ(use.position, 150);
  EXPECT_EQ(use.full_bytes, 150u * 3 * 2 * 32 * 2);
  EXPECT_LT(use.kept_bytes, use.full_bytes);
  EXPECT_GT(use.kept_bytes, 0u);
  EXPECT_GT(use.compress_ms, 0.0);
  ASSERT_EQ(use.heads.size(), 3u);
  EXPECT_EQ(use.heads[2].layer, 2);
  EXPECT_EQ(use.heads[2].kept_tokens, 150);
  EXPECT_EQ(use.heads[2].plan, "FULL kivi4/kivi4");
  driver.expect_nothing_left();
}

TEST(SchedulerBoundary, ABoundaryOfTheAnswerGoesWithTheRunThatReachesIt) {
  Driver driver(kv_config(1), kStages);
  engine::EngineRequest kept = policy_request(150, 80, KvProfile::kInt4);
  kept.session_id = "s";
  kept.keep_session = true;
  ASSERT_TRUE(driver.submit(policy_request(150, 80, KvProfile::kInt4)).ok());
  ASSERT_TRUE(driver.submit(kept).ok());
  int n_after = 0;
  int n_before = 0;
  while (const auto plan = driver.step()) {
    for (const auto& order : plan->compress()) {
      if (order.n_tokens() != 214) continue;
      const auto run = std::find_if(plan->runs().begin(), plan->runs().end(), [&](const auto& r) {
        return r.sequence() == order.sequence();
      });
      ASSERT_NE(run, plan->runs().end());
      EXPECT_EQ(run->first_position(), order.after_runs() ? 213 : 214);
      ++(order.after_runs() ? n_after : n_before);
      if (!order.after_runs()) continue;
      // The next room goes with it: what the boundary gives back must not be somebody else's first.
      ASSERT_EQ(plan->grow_size(), 1);
      EXPECT_EQ(plan->grow(0).sequence(), order.sequence());
      EXPECT_TRUE(plan->grow(0).after_runs());
      EXPECT_EQ(plan->grow(0).granted_tokens(), 229);
    }
    driver.deliver_all();
  }
  EXPECT_EQ(n_after, 1);
  EXPECT_EQ(n_before, 1) << "a session may end at the boundary and is kept as it is";
}

TEST(SchedulerBoundary, GeneratedTokensLeaveTheTailEvery64) {
  Driver driver(kv_config(1), kStages);
  ASSERT_TRUE(driver.submit(policy_request(150, 300, KvProfile::kInt4)).ok());
  std::vector<int> lengths;
  while (const auto plan = driver.step()) {
    for (const auto& order : plan->compress()) {
      lengths.push_back(order.n_tokens());
      EXPECT_EQ(order.heads().empty(), order.n_tokens() > 150);
      EXPECT_EQ(order.selects(), order.n_tokens() == 150);
    }
    driver.stages().expect_content();
    driver.deliver_all();
  }
  EXPECT_EQ(lengths, (std::vector<int>{150, 214, 278, 342, 406}));
  EXPECT_EQ(driver.lives().begin()->second.n_ended, 1);
  driver.expect_nothing_left();
}

// A chunk that began in the prompt went on past the first boundary of the output after it.
TEST(SchedulerBoundary, ResumedOutputLeavesTheTailAlsoWhenAChunkBeganInThePrompt) {
  Driver driver(kv_config(1), kStages);
  engine::EngineRequest request = policy_request(210, 4, KvProfile::kKivi4);
  request.resumed_tokens = 80;  // output begins at 130
  request.compress_at = {120};
  ASSERT_TRUE(driver.submit(std::move(request)).ok());
  std::vector<int> compressed_at;
  for (int i = 0; i < 20; ++i) {
    const auto plan = driver.step();
    if (plan) {
      for (const auto& order : plan->compress()) compressed_at.push_back(order.n_tokens());
    }
    driver.deliver_all();
  }
  EXPECT_EQ(compressed_at, (std::vector<int>{120, 194}));
  EXPECT_TRUE(driver.lives().begin()->second.status.ok());
}

// With its output counted as prompt, it could need a page more than there is, and wait for ever.
TEST(SchedulerBoundary, WhatFitsAloneAlsoFitsWhenItIsComputedAnew) {
  engine::EngineRequest request = policy_request(209, 24, KvProfile::kKivi4);
  engine::EngineRequest again = policy_request(231, 2, KvProfile::kKivi4);
  again.resumed_tokens = 22;
  std::int64_t n_pages = 1;
  while (!Driver(kv_config(1), {{2, n_pages}, {1, 1000}}).submit(request).ok()) ++n_pages;
  const auto handle = Driver(kv_config(1), {{2, n_pages}, {1, 1000}}).submit(again);
  EXPECT_TRUE(handle.ok()) << handle.status().to_string();
}

TEST(SchedulerBoundary, ShortPromptsStayInFullPrecision) {
  Driver driver(kv_config(2), kStages);
  const Life& life = driver.run(policy_request(100, 200, KvProfile::kSpindle));
  EXPECT_TRUE(life.status.ok());
  EXPECT_EQ(life.tokens.at(0).size(), 200u);
  ASSERT_EQ(life.summary.boundaries.size(), 1u);
  EXPECT_EQ(life.summary.boundaries[0].heads[1].plan, "FULL raw/raw");
  EXPECT_EQ(life.summary.boundaries[0].heads[1].kept_tokens, 100);
  driver.expect_nothing_left();
}

TEST(SchedulerBoundary, EveryProfileRunsToItsEnd) {
  for (const KvProfile profile : kvstore::all_profiles()) {
    SCOPED_TRACE(std::string(kvstore::profile_name(profile)));
    Driver driver(kv_config(2), kStages);
    const Life& life = driver.run(policy_request(600, 150, profile, 2));
    EXPECT_TRUE(life.status.ok()) << life.status.to_string();
    EXPECT_EQ(life.tokens.at(1).size(), 150u);
    EXPECT_EQ(life.summary.boundaries.size(), profile == KvProfile::kFull ? 0u : 1u);
    driver.expect_nothing_left();
    if (HasFailure()) return;
  }
}

// Without a token table plans count the ids of the prompt, those of a later segment once.
TEST(SchedulerBoundary, PlansKnowTheBytesOfOwnTokenIds) {
  SchedulerConfig config = kv_config(2);
  config.kv_model.token_table = false;
  Driver driver(config, kStages);
  // 50 ids in the first segment, all known in the second.
  engine::EngineRequest request = policy_request(600, 70, KvProfile::kSpindle);
  request.compress_at = {300, 600};
  request.kv_policy.ratio = 0.4;
  const Life& life = driver.run(request);
  ASSERT_TRUE(life.status.ok()) << life.status.to_string();
  ASSERT_EQ(life.summary.boundaries.size(), 2u);
  const auto bytes = [&](std::int64_t n, std::int64_t n_ids) {
    return kvstore::head_block_bytes(
        {.codec = {kernels::KvFormat::kToken, kernels::KvFormat::kToken}}, config.kv_model, n,
        nullptr, n_ids);
  };
  const engine::HeadKvUse& first = life.summary.boundaries[0].heads[0];
  EXPECT_EQ(first.plan, "FULL token");
  EXPECT_EQ(first.bytes, bytes(300, kVocab));
  EXPECT_EQ(life.summary.boundaries[1].heads[0].bytes, bytes(300, kVocab) + bytes(300, 0));
  driver.expect_nothing_left();
}

TEST(SchedulerBoundary, SegmentsAreCompressedOneAfterTheOther) {
  Driver driver(kv_config(2), kStages);
  engine::EngineRequest request = policy_request(700, 80, KvProfile::kSnapKv, 2);
  request.compress_at = {200, 300, 310, 650};
  const auto handle = driver.submit(request);
  ASSERT_TRUE(handle.ok());
  std::vector<std::array<int, 4>> orders;
  for (int i = 0; i < 500; ++i) {
    const auto plan = driver.step();
    if (plan) {
      for (const auto& order : plan->compress()) {
        if (!order.heads().empty()) {
          orders.push_back({order.n_tokens(), order.prompt_left(), order.boundaries_left(),
                            static_cast<int>(order.forks())});
        }
      }
    }
    if (i % 3 == 0) driver.deliver_all();
  }
  EXPECT_EQ(orders, (std::vector<std::array<int, 4>>{
                        {200, 500, 3, 1}, {300, 400, 2, 1}, {310, 390, 1, 1}, {650, 50, 0, 1}}));
  const Life& life = driver.lives().at(*handle);
  EXPECT_TRUE(life.status.ok());
  ASSERT_EQ(life.summary.boundaries.size(), 4u);
  EXPECT_EQ(life.summary.boundaries[3].position, 650);
  EXPECT_LT(life.summary.boundaries[3].heads[2].kept_tokens, 650);
  driver.expect_nothing_left();
}

TEST(SchedulerBoundary, ChoicesForkWhatTheBoundaryLeft) {
  Driver driver(kv_config(3), kStages);
  ASSERT_TRUE(driver.submit(policy_request(300, 100, KvProfile::kInt4, 3)).ok());
  // Until all scores are in, the choices have their first tokens and wait.
  while (driver.step()) driver.deliver(1);  // the last stage's results alone
  EXPECT_EQ(driver.lives().begin()->second.tokens.size(), 0u) << "chunks wait for no one";
  while (driver.has_late()) {
    driver.deliver(0);
    if (driver.step()) break;
  }
  driver.run();
  const Life& life = driver.lives().begin()->second;
  EXPECT_EQ(life.n_ended, 1);
  for (int c = 0; c < 3; ++c) EXPECT_EQ(life.tokens.at(c).size(), 100u);
  driver.expect_nothing_left();
}

// Runs until the boundary's run has been sampled and one stage has not reported its scores.
void stop_at_boundary(Driver& driver) {
  for (int i = 0; i < 100 && driver.lives().begin()->second.tokens.empty(); ++i) {
    while (driver.step()) {
    }
    driver.deliver(1);
    if (driver.lives().begin()->second.tokens.empty()) driver.deliver(0);
  }
  ASSERT_FALSE(driver.lives().begin()->second.tokens.empty());
}

TEST(SchedulerBoundary, AFirstChoiceThatEndsAtTheBoundaryIsFreedAfterTheForks) {
  Driver driver(kv_config(4), kStages);
  engine::EngineRequest request = policy_request(300, 100, KvProfile::kInt4, 3);
  request.sampling.stop_token_ids = {next_token(request.prompt_ids)};
  const auto handle = driver.submit(request);
  ASSERT_TRUE(handle.ok());
  stop_at_boundary(driver);
  Life& life = driver.lives().at(*handle);
  EXPECT_EQ(life.finished.at(0), engine::FinishReason::kStop);
  driver.finish_choice(*handle, 1);  // and one more, by a stop string, while it is held
  EXPECT_FALSE(driver.step().has_value());
  driver.run();
  EXPECT_EQ(life.n_ended, 1);
  EXPECT_TRUE(life.status.ok());
  EXPECT_GE(life.tokens.at(2).size(), 1u);
  driver.expect_nothing_left();
}

TEST(SchedulerBoundary, ARequestCanBeCancelledAtEveryMoment) {
  for (int n_choices : {1, 3}) {
    for (int moment = 0; moment < 60; ++moment) {
      SCOPED_TRACE("moment " + std::to_string(moment) + ", n " + std::to_string(n_choices));
      Driver driver(kv_config(3), kStages);
      engine::EngineRequest request = policy_request(350, 90, KvProfile::kDefensive, n_choices);
      request.compress_at = {200, 350};
      const auto handle = driver.submit(request);
      ASSERT_TRUE(handle.ok());
      // Steps and results one at a time, the last stage's late.
      for (int i = 0; i < moment; ++i) {
        if (i % 3 == 0) driver.step();
        if (i % 3 == 1) driver.deliver(0);
        if (i % 3 == 2) driver.deliver(1);
      }
      driver.cancel(*handle);
      driver.run();
      const Life& life = driver.lives().at(*handle);
      EXPECT_EQ(life.n_ended, 1);
      EXPECT_EQ(life.status.code(), StatusCode::kCancelled);
      driver.expect_nothing_left();
      if (HasFailure()) return;
    }
  }
}

TEST(SchedulerBoundary, APolicyOutOfReachIsRefused) {
  Driver driver(kv_config(1), kStages);
  engine::EngineRequest request = policy_request(300, 10, KvProfile::kInt4);
  request.kv_policy.ratio = 0.01;
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
  request = policy_request(300, 10, KvProfile::kInt4);
  request.compress_at = {200, 200};
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
  request.compress_at = {200, 301};
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
  request.compress_at = {0};
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
}

TEST(SchedulerBoundary, MoreBoundariesThanMemoryAreRefused) {
  Driver driver(kv_config(1), kStages);
  engine::EngineRequest request = policy_request(600, 10, KvProfile::kInt4);
  for (int p = 200; p <= 600; ++p) request.compress_at.push_back(p);
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
  request.compress_at.clear();
  for (int p = 200; p <= 600; p += 10) request.compress_at.push_back(p);
  const Life& life = driver.run(request);
  EXPECT_TRUE(life.status.ok()) << life.status.to_string();
  EXPECT_EQ(life.summary.boundaries.size(), 41u);
  driver.expect_nothing_left();
}

TEST(SchedulerBoundary, PromptScoresAreOfThePositionsAskedFor) {
  for (const auto& [first, end] : std::vector<std::pair<int, int>>{
           {1, 400}, {1, 2}, {399, 400}, {96, 97}, {97, 98}, {50, 230}, {200, 201}}) {
    Driver driver(kv_config(2), kStages);
    engine::EngineRequest request = policy_request(400, 3, KvProfile::kInt4);
    request.compress_at = {200};
    request.prompt_scores = {first, end, false};
    const Life& life = driver.run(request);
    ASSERT_EQ(life.scores.size(), static_cast<std::size_t>(end - first)) << first << " " << end;
    for (int p = first; p < end; ++p) {
      const engine::PromptScore& score = life.scores[static_cast<std::size_t>(p - first)];
      ASSERT_EQ(score.position, p);
      ASSERT_EQ(score.logprob,
                -static_cast<float>(request.prompt_ids[static_cast<std::size_t>(p)]));
    }
    driver.expect_nothing_left();
  }
  Driver driver(kv_config(2), kStages);
  engine::EngineRequest request = request_of(400, 3);
  request.prompt_scores = {0, 10, false};
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
  request.prompt_scores = {10, 401, false};
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace spindle::coordinator
