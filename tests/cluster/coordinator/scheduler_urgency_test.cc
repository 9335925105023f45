// Priorities, time limits, owners, short prompts beside long ones, and requests that grow.

#include "tests/cluster/coordinator/simulated_stages.h"

namespace spindle::coordinator {
namespace {

engine::EngineRequest endless(int n_prompt, int max_tokens) {
  engine::EngineRequest request = request_of(n_prompt, max_tokens);
  request.sampling.ignore_eos = true;
  return request;
}

TEST(SchedulerUrgency, ARequestWhoseTimeIsOverEndsWaitingOrRunning) {
  SchedulerConfig config = kv_config(2);
  config.max_num_seqs = 1;
  Driver driver(config, {{2, 400}, {1, 200}});
  engine::EngineRequest running = endless(50, 400);
  running.timeout_us = 100;
  engine::EngineRequest waiting = endless(50, 20);
  waiting.timeout_us = 50;
  const auto first = driver.submit(running);
  const auto second = driver.submit(waiting);
  ASSERT_TRUE(first.ok() && second.ok());
  driver.run();
  EXPECT_EQ(driver.lives().at(*first).status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(driver.lives().at(*second).status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(driver.lives().at(*second).tokens.size(), 0u);
  EXPECT_FALSE(driver.lives().at(*first).tokens.empty());
  EXPECT_EQ(driver.scheduler().stats().expired, 2u);
  driver.expect_nothing_left();
}

TEST(SchedulerUrgency, TimesAndPrioritiesOutOfRangeAreRefused) {
  Driver driver(kv_config(1), {{2, 400}, {1, 200}});
  engine::EngineRequest request = endless(10, 5);
  request.priority = engine::kMaxPriority + 1;
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
  request.priority = 0;
  request.timeout_us = -1;
  EXPECT_EQ(driver.submit(request).status().code(), StatusCode::kInvalidArgument);
}

TEST(SchedulerUrgency, AMoreUrgentRequestTakesTheRoomOfALessUrgentOne) {
  Driver driver(kv_config(2), {{2, 44}, {1, 22}});
  engine::EngineRequest casual = endless(300, 250);
  casual.priority = 5;
  const auto first = driver.submit(casual);
  ASSERT_TRUE(first.ok());
  for (int i = 0; i < 20; ++i) {
    driver.step();
    driver.deliver_all();
  }
  engine::EngineRequest urgent = endless(300, 250);
  urgent.priority = -5;
  const auto second = driver.submit(urgent);
  ASSERT_TRUE(second.ok());
  // As the engine does: the next plan is made while the last one is on its way, and who runs there
  // can be preempted here.
  for (int i = 0; i < 5; ++i) {
    driver.step();
    driver.step();
    driver.deliver_all();
  }
  driver.run();
  const engine::EngineStats stats = driver.scheduler().stats();
  EXPECT_EQ(stats.finished, 2u);
  EXPECT_GE(stats.preemptions, 1u);
  EXPECT_GT(stats.recomputed_tokens, 0u);
  // The urgent one ended first, and neither's output suffered (the driver compares them).
  EXPECT_LT(driver.lives().at(*second).summary.total_ms,
            driver.lives().at(*first).summary.total_ms);
  driver.expect_nothing_left();
}

TEST(SchedulerUrgency, RequestsOfOnePriorityDoNotTakeEachOthersRoomAtAdmission) {
  Driver driver(kv_config(2), {{2, 44}, {1, 22}});
  ASSERT_TRUE(driver.submit(endless(300, 60)).ok());
  ASSERT_TRUE(driver.submit(endless(300, 60)).ok());
  driver.run();
  EXPECT_EQ(driver.scheduler().stats().finished, 2u);
  EXPECT_EQ(driver.scheduler().stats().preemptions, 0u);
}

TEST(SchedulerUrgency, AShortPromptIsServedBesideALongOne) {
  Driver driver(kv_config(2), {{2, 400}, {1, 200}});
  const auto longer = driver.submit(endless(1400, 5));
  ASSERT_TRUE(longer.ok());
  driver.step();
  driver.deliver_all();
  const auto shorter = driver.submit(endless(30, 5));
  ASSERT_TRUE(shorter.ok());
  driver.run();
  EXPECT_LT(driver.lives().at(*shorter).summary.time_to_first_token_ms,
            driver.lives().at(*longer).summary.time_to_first_token_ms / 2);
}

// Near its end too: what is left of the long one is more than the short one's own.
TEST(SchedulerUrgency, AShortPromptIsServedBesideTheEndOfALongOne) {
  Driver driver(kv_config(1), {{2, 400}});  // steps of 96 tokens
  const auto longer = driver.submit(endless(1000, 2));
  ASSERT_TRUE(longer.ok());
  for (int i = 0; i < 8; ++i) {
    driver.step();
    driver.deliver_all();
  }
  const auto shorter = driver.submit(endless(90, 2));
  ASSERT_TRUE(shorter.ok());
  const auto plan = driver.step();
  ASSERT_TRUE(plan.has_value());
  ASSERT_EQ(plan->runs_size(), 2);
  EXPECT_EQ(plan->runs(0).tokens_size(), 6);
  EXPECT_EQ(plan->runs(1).tokens_size(), 90);
  driver.run();
  EXPECT_LT(driver.lives().at(*shorter).summary.time_to_first_token_ms,
            driver.lives().at(*longer).summary.time_to_first_token_ms);
}

// More of them at once would only hold KV.
TEST(SchedulerUrgency, ShortPromptsBesideALongOneDoNotCrowd) {
  Driver driver(kv_config(1), {{2, 400}});
  ASSERT_TRUE(driver.submit(endless(1400, 2)).ok());
  driver.step();
  driver.deliver_all();
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(driver.submit(endless(300, 2)).ok());
  const auto plan = driver.step();
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->open_size(), 1);
  driver.run();
  EXPECT_EQ(driver.scheduler().stats().finished, 6u);
}

// However many short ones come, the long one has half of all steps.
TEST(SchedulerUrgency, ShortPromptsDoNotHoldUpALongOne) {
  Driver driver(kv_config(1), {{2, 400}});  // steps of 96 tokens
  const auto longer = driver.submit(endless(1400, 1));
  ASSERT_TRUE(longer.ok());
  driver.step();
  driver.deliver_all();
  std::int64_t n_long = 0;
  std::int64_t n_short = 0;
  for (int i = 0; i < 20; ++i) {
    while (driver.scheduler().stats().waiting < 2) {
      ASSERT_TRUE(driver.submit(endless(60, 1)).ok());
    }
    const auto plan = driver.step();
    driver.deliver_all();
    if (!plan) continue;
    for (const control::Run& run : plan->runs()) {
      (run.sequence() == 1 ? n_long : n_short) += run.tokens_size();
    }
  }
  EXPECT_GE(n_long, 700);
  EXPECT_GE(n_short, 700);
  driver.run();
  driver.expect_nothing_left();
}

// What shorter prompts have saved is not for longer ones that come behind the oldest.
TEST(SchedulerUrgency, LongPromptsDoNotOvertakeAShortOne) {
  Driver driver(kv_config(1), {{2, 400}});
  ASSERT_TRUE(driver.submit(endless(1400, 1)).ok());
  driver.run();
  const auto shorter = driver.submit(endless(180, 1));
  ASSERT_TRUE(shorter.ok() && driver.submit(endless(1400, 1)).ok());
  const auto plan = driver.step();
  ASSERT_TRUE(plan.has_value());
  ASSERT_EQ(plan->open_size(), 1);
  ASSERT_EQ(plan->runs_size(), 1);
  EXPECT_EQ(plan->runs(0).tokens_size(), 96);
  driver.deliver_all();
  const auto next = driver.step();  // the other 84, and what is left of the step for the long one
  ASSERT_TRUE(next.has_value());
  ASSERT_EQ(next->runs_size(), 2);
  EXPECT_EQ(next->runs(0).tokens_size(), 84);
  EXPECT_EQ(next->runs(1).tokens_size(), 12);
  driver.deliver_all();
  driver.run();
  driver.expect_nothing_left();
}

TEST(SchedulerUrgency, ChunksShrinkAsThePrefixGrows) {
  SchedulerConfig config = kv_config(1);
  config.attention_parity_tokens = 300;
  Driver driver(config, {{2, 400}, {1, 200}});
  ASSERT_TRUE(driver.submit(endless(1200, 2)).ok());
  std::vector<int> chunks;
  for (int i = 0; i < 60; ++i) {
    const auto plan = driver.step();
    driver.deliver_all();
    if (!plan || plan->runs().empty() || plan->runs(0).tokens_size() == 1) continue;
    chunks.push_back(plan->runs(0).tokens_size());
  }
  ASSERT_GT(chunks.size(), 14u);
  for (std::size_t i = 1; i + 1 < chunks.size(); ++i) EXPECT_LE(chunks[i], chunks[i - 1]);
  EXPECT_GT(chunks.front(), 80);
  EXPECT_GE(chunks[chunks.size() - 2], 96 / 8);  // never tiny
}

// What a request is admitted for is its prompt and the first boundary, not all it may say.
TEST(SchedulerUrgency, ManyLongAnswersBeginInAPoolForAFewOfThem) {
  Driver driver(kv_config(2), {{2, 100}, {1, 50}});
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(driver.submit(endless(40, 1000)).ok());
  for (int i = 0; i < 12; ++i) {
    driver.step();
    driver.deliver_all();
  }
  EXPECT_GE(driver.scheduler().stats().running, 4);
  driver.run();
  EXPECT_EQ(driver.scheduler().stats().finished, 6u);
  EXPECT_GT(driver.scheduler().stats().preemptions, 0u);
  driver.expect_nothing_left();
}

}  // namespace
}  // namespace spindle::coordinator
