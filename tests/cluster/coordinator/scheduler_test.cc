// The scheduler against simulated stages, in full precision. No threads, no clock but a counter.

#include "cluster/coordinator/scheduler.h"

#include <gtest/gtest.h>

#include "tests/cluster/coordinator/simulated_stages.h"

namespace spindle::coordinator {
namespace {

TEST(Scheduler, APromptIsChunkedAndSampledOnce) {
  Scheduler scheduler(small_config(2), KvLedger(kShape, {{1, 100}}));
  ASSERT_TRUE(scheduler.submit(request_of(50, 5), 1).ok());
  const auto first = scheduler.next_step(2);
  ASSERT_TRUE(first.has_value());
  ASSERT_EQ(first->runs_size(), 1);
  EXPECT_EQ(first->runs(0).tokens_size(), 20);
  EXPECT_FALSE(first->runs(0).sample());
  EXPECT_EQ(first->open(0).max_tokens(), 54);
  const auto second = scheduler.next_step(3);  // the next chunk does not wait for the first
  ASSERT_TRUE(second.has_value());
  EXPECT_EQ(second->runs(0).first_position(), 20);
  EXPECT_FALSE(scheduler.next_step(4).has_value());  // two steps are in flight
  control::StepResult result;
  result.set_step(1);
  ASSERT_TRUE(scheduler.on_result(result, 5).ok());
  const auto third = scheduler.next_step(6);
  ASSERT_TRUE(third.has_value());
  EXPECT_EQ(third->runs(0).tokens_size(), 10);
  EXPECT_TRUE(third->runs(0).sample());
}

// Of all that is not done an equal part for each step in flight and the next; not less than an
// eighth of the largest step.
TEST(Scheduler, PromptsAreSpreadOverTheSteps) {
  SchedulerConfig config = small_config(3);
  config.max_num_batched_tokens = 64;
  for (const int n_stages : {1, 2}) {
    const std::vector<StageCapacity> capacities(static_cast<std::size_t>(n_stages), {1, 100});
    Scheduler scheduler(config, KvLedger(kShape, capacities));
    SimulatedStages stages(capacities);
    ASSERT_TRUE(scheduler.submit(request_of(100, 1), 1).ok());
    std::vector<int> chunks;
    std::vector<control::StepPlan> plans;
    const auto fill = [&] {
      while (auto plan = scheduler.next_step(2)) {
        chunks.push_back(plan->runs(0).tokens_size());
        plans.push_back(std::move(*plan));
      }
    };
    fill();
    EXPECT_EQ(chunks, n_stages == 1 ? std::vector({64, 36}) : std::vector({25, 25, 25}));
    for (std::size_t next = 0; next < plans.size(); ++next) {
      for (const auto& result : stages.run(plans[next])) {
        ASSERT_TRUE(scheduler.on_result(result, 3).ok());
      }
      fill();
    }
    if (n_stages == 1) continue;
    EXPECT_EQ(chunks, (std::vector{25, 25, 25, 18, 7}));  // 18 of the 75 not done by then
  }
}

// A part of what is left may be less than a token; of small steps an eighth is, too.
TEST(Scheduler, TheLastTokensOfAPromptComeHoweverSmallStepsAre) {
  const std::vector<StageCapacity> capacities = {{1, 100}, {1, 100}};
  for (int n_tokens = 1; n_tokens <= 9; ++n_tokens) {
    for (const int max_in_flight : {1, 2, 8}) {
      SCOPED_TRACE(std::to_string(n_tokens) + " tokens, " + std::to_string(max_in_flight) +
                   " in flight");
      SchedulerConfig config = small_config(max_in_flight);
      config.max_num_batched_tokens = n_tokens;
      Scheduler scheduler(config, KvLedger(kShape, capacities));
      SimulatedStages stages(capacities);
      for (const int n_prompt : {5, 20, 1}) {
        ASSERT_TRUE(scheduler.submit(request_of(n_prompt, 2, 2), 1).ok());
      }
      for (int step = 0; step < 200 && scheduler.counters().finished < 3; ++step) {
        const auto plan = scheduler.next_step(2);
        ASSERT_TRUE(plan.has_value());
        for (const auto& result : stages.run(*plan)) {
          ASSERT_TRUE(scheduler.on_result(result, 3).ok());
        }
      }
      EXPECT_EQ(scheduler.counters().finished, 3u);
    }
  }
}

TEST(Scheduler, DecodeTokensAreSpreadOverTheStages) {
  SchedulerConfig config = small_config(3);
  config.max_num_batched_tokens = 160;
  Scheduler scheduler(config, KvLedger(kShape, {{1, 100}, {1, 100}}));
  SimulatedStages stages({{1, 100}, {1, 100}});
  for (int i = 0; i < 4; ++i) {
    engine::EngineRequest request = request_of(5, 100);
    request.sampling.ignore_eos = true;
    ASSERT_TRUE(scheduler.submit(request, 1).ok());
  }
  const auto prefill = scheduler.next_step(2);  // 4 x 5 prompt tokens fit one step
  ASSERT_EQ(prefill->runs_size(), 4);
  for (const auto& result : stages.run(*prefill)) ASSERT_TRUE(scheduler.on_result(result, 3).ok());
  const auto a = scheduler.next_step(4);
  const auto b = scheduler.next_step(4);
  ASSERT_TRUE(a && b);
  EXPECT_EQ(a->runs_size(), 2);
  EXPECT_EQ(b->runs_size(), 2);
  EXPECT_FALSE(scheduler.next_step(4).has_value());
}

TEST(Scheduler, SequencesThatComeLateJoinTheOthersInsteadOfAStepOfTheirOwn) {
  Scheduler scheduler(small_config(3), KvLedger(kShape, {{1, 100}}));
  SimulatedStages stages({{1, 100}});
  const auto deliver = [&](const std::vector<control::StepResult>& results) {
    for (const auto& result : results) ASSERT_TRUE(scheduler.on_result(result, 3).ok());
  };
  engine::EngineRequest request = request_of(5, 100);
  request.sampling.ignore_eos = true;
  ASSERT_TRUE(scheduler.submit(request, 1).ok());
  deliver(stages.run(*scheduler.next_step(1)));
  const auto decode = scheduler.next_step(2);  // the first sequence alone
  ASSERT_EQ(decode->runs_size(), 1);
  const auto decoded = stages.run(*decode);
  ASSERT_TRUE(scheduler.submit(request, 2).ok());
  deliver(stages.run(*scheduler.next_step(2)));      // the second one's prompt
  EXPECT_FALSE(scheduler.next_step(3).has_value());  // waits for the first
  deliver(decoded);
  EXPECT_EQ(scheduler.next_step(4)->runs_size(), 2);  // now both
}

TEST(Scheduler, TheLastRunFreesItsSequenceWhenTheLengthIsReached) {
  Driver driver(small_config(1), {{1, 100}, {1, 100}});
  ASSERT_TRUE(driver.submit(request_of(10, 3)).ok());
  const auto prompt = driver.step();
  ASSERT_TRUE(prompt.has_value());
  const std::uint64_t sequence = prompt->runs(0).sequence();
  EXPECT_EQ(prompt->free_after_runs_size(), 0);
  driver.deliver_all();
  const auto second = driver.step();
  ASSERT_TRUE(second.has_value());
  EXPECT_EQ(second->free_after_runs_size(), 0);
  driver.deliver_all();
  const auto last = driver.step();
  ASSERT_TRUE(last.has_value());
  ASSERT_EQ(last->free_after_runs_size(), 1);
  EXPECT_EQ(last->free_after_runs(0), sequence);
  driver.deliver_all();
  const Life& life = driver.lives().begin()->second;
  EXPECT_EQ(life.n_ended, 1) << "it needs no order of its own";
  EXPECT_EQ(life.tokens.at(0).size(), 3u);
  EXPECT_EQ(life.summary.kv[1].full_bytes, 12u * 2 * 32 * 2);
  EXPECT_FALSE(driver.step().has_value());
  driver.expect_nothing_left();
}

TEST(Scheduler, ACancelledRequestWhoseLastRunIsSentIsFreedOnce) {
  Driver driver(small_config(2), {{1, 100}});
  const auto handle = driver.submit(request_of(10, 1));
  ASSERT_TRUE(handle.ok());
  const auto plan = driver.step();
  ASSERT_TRUE(plan.has_value());
  EXPECT_EQ(plan->free_after_runs_size(), 1);
  driver.scheduler().cancel(*handle, 0);
  EXPECT_FALSE(driver.step().has_value()) << "nothing is left to order";
  driver.deliver_all();
  EXPECT_EQ(driver.lives().begin()->second.status.code(), StatusCode::kCancelled);
  driver.expect_nothing_left();
}

TEST(Scheduler, ResultsThatDoNotBelongAreErrors) {
  Scheduler scheduler(small_config(1), KvLedger(kShape, {{1, 100}}));
  control::StepResult result;
  result.set_step(9);
  EXPECT_EQ(scheduler.on_result(result, 1).code(), StatusCode::kInternal);
  ASSERT_TRUE(scheduler.submit(request_of(5, 5), 1).ok());
  ASSERT_TRUE(scheduler.next_step(1).has_value());
  result.set_step(1);
  result.set_stage(3);
  EXPECT_EQ(scheduler.on_result(result, 1).code(), StatusCode::kInternal);
  result.set_stage(0);
  result.set_error("out of luck");
  const Status failed = scheduler.on_result(result, 1);
  EXPECT_EQ(failed.code(), StatusCode::kInternal);
  EXPECT_NE(failed.message().find("out of luck"), std::string::npos);
}

TEST(Scheduler, AModelWithoutAFiniteProbabilityFailsItsRequestOnly) {
  Scheduler scheduler(small_config(1), KvLedger(kShape, {{1, 100}}));
  const auto bad = scheduler.submit(request_of(5, 5), 1);
  const auto good = scheduler.submit(request_of(6, 5), 1);
  const auto plan = scheduler.next_step(1);
  control::StepResult result;
  result.set_step(1);
  for (const auto& run : plan->runs()) {
    auto& sampled = *result.add_sampled();
    sampled.set_sequence(run.sequence());
    sampled.set_token(run.tokens_size() == 5 ? -1 : 3);
  }
  ASSERT_TRUE(scheduler.on_result(result, 2).ok());
  const auto next = scheduler.next_step(3);
  ASSERT_TRUE(next.has_value());
  EXPECT_EQ(next->free_size(), 1);
  EXPECT_EQ(next->runs_size(), 1);
  EXPECT_EQ(scheduler.stats().running, 2);  // the failed one until its KV is free
  EXPECT_TRUE(bad.ok() && good.ok());
}

// Requests that come at once wait for the next steps, but not in the queue, as long as they can
// run.
TEST(Scheduler, TheQueueIsForThoseThatHaveNoPlace) {
  for (const int n_queued : {0, 2}) {
    SchedulerConfig config = small_config(1);
    config.max_num_seqs = 3;
    config.max_num_queued_reqs = n_queued;
    const std::vector<StageCapacity> capacities = {{1, 100}};
    Scheduler scheduler(config, KvLedger(kShape, capacities));
    SimulatedStages stages(capacities);
    for (int i = 0; i < 3 + n_queued; ++i) {
      EXPECT_TRUE(scheduler.admission().ok());
      ASSERT_TRUE(scheduler.submit(request_of(5, 8), 1).ok());
    }
    EXPECT_EQ(scheduler.admission().code(), StatusCode::kResourceExhausted);
    EXPECT_EQ(scheduler.submit(request_of(5, 8), 1).status().code(),
              StatusCode::kResourceExhausted);
    // Nor is there one while three run.
    const auto plan = scheduler.next_step(2);
    ASSERT_TRUE(plan.has_value());
    EXPECT_EQ(plan->open_size(), 3);
    for (const auto& result : stages.run(*plan)) ASSERT_TRUE(scheduler.on_result(result, 3).ok());
    EXPECT_EQ(scheduler.admission().code(), StatusCode::kResourceExhausted);
  }
}

TEST(Scheduler, RefusesWhatCanNeverRun) {
  Scheduler scheduler(small_config(1), KvLedger(kShape, {{1, 4}}));
  EXPECT_EQ(scheduler.submit(request_of(10, 150), 1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(scheduler.submit(request_of(0, 5), 1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(scheduler.submit(request_of(200, 5), 1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(scheduler.submit(request_of(199, 5), 1).status().code() ==
              StatusCode::kInvalidArgument);  // 199 tokens need 7 pages
  EXPECT_TRUE(scheduler.submit(request_of(100, 20), 1).ok());
  EXPECT_EQ(scheduler.stats().accepted, 1u);
}

}  // namespace
}  // namespace spindle::coordinator
