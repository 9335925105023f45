// The scheduler against simulated stages: real KV stores that run every plan in order, and a model
// whose next token is a hash of the sequence. No threads, no clock but a counter.

#include "cluster/coordinator/scheduler.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "kvstore/kv_store.h"

namespace spindle::coordinator {
namespace {

constexpr kvstore::KvShape kShape{1, 16, DType::kF16, 32};
constexpr std::int32_t kVocab = 50;
constexpr std::int32_t kEos = 7;

std::int32_t next_token(const std::vector<std::int32_t>& tokens) {
  std::uint32_t hash = 2166136261u;
  for (const std::int32_t token : tokens)
    hash = (hash ^ static_cast<std::uint32_t>(token)) * 16777619u;
  return static_cast<std::int32_t>((hash >> 7) % kVocab);
}

// Stages that keep what a plan says and check that it makes sense.
class SimulatedStages {
 public:
  SimulatedStages(const std::vector<StageCapacity>& stages) {
    for (const StageCapacity& stage : stages) {
      kvstore::KvStoreConfig config;
      config.shape = kShape;
      config.n_layers = stage.n_layers;
      config.budget_bytes = static_cast<std::uint64_t>(stage.n_pages) * kShape.page_bytes();
      stores_.push_back(std::move(*kvstore::KvStore::create(config)));
    }
  }

  std::vector<control::StepResult> run(const control::StepPlan& plan) {
    std::vector<control::StepResult> results;
    for (std::size_t stage = 0; stage < stores_.size(); ++stage) {
      control::StepResult& result = results.emplace_back();
      result.set_step(plan.step());
      result.set_stage(static_cast<int>(stage));
      run_stage(plan, *stores_[stage], result);
    }
    sample(plan, results.back());
    return results;
  }

  std::int64_t used_pages(std::size_t stage) const {
    return stores_[stage]->pool().n_used() + stores_[stage]->pool().n_reserved();
  }

 private:
  static void run_stage(const control::StepPlan& plan, kvstore::KvStore& store,
                        control::StepResult& result) {
    for (const auto& fork : plan.fork()) {
      const Status status = store.fork(fork.parent(), fork.child().sequence(),
                                       fork.child().prompt_tokens(), fork.child().max_tokens());
      ASSERT_TRUE(status.ok()) << status.to_string();
    }
    for (const std::uint64_t sequence : plan.free()) {
      const auto freed = store.free(sequence);
      ASSERT_TRUE(freed.ok()) << freed.status().to_string();
      auto& report = *result.add_freed();
      report.set_sequence(sequence);
      report.set_full_bytes(freed->full_bytes);
      report.set_kept_bytes(freed->kept_bytes);
    }
    for (const auto& open : plan.open()) {
      const Status status = store.open(open.sequence(), open.max_tokens());
      ASSERT_TRUE(status.ok()) << status.to_string();
    }
    std::set<std::uint64_t> seen;
    for (const auto& run : plan.runs()) {
      ASSERT_TRUE(seen.insert(run.sequence()).second) << "a sequence runs twice in one step";
      ASSERT_EQ(store.length(run.sequence()), run.first_position());
      const Status status = store.extend(run.sequence(), run.tokens_size());
      ASSERT_TRUE(status.ok()) << status.to_string();
    }
    store.check_invariants();
  }

  void sample(const control::StepPlan& plan, control::StepResult& result) {
    for (const auto& fork : plan.fork()) tokens_[fork.child().sequence()] = prompts_[fork.parent()];
    for (const auto& run : plan.runs()) {
      std::vector<std::int32_t>& tokens = tokens_[run.sequence()];
      tokens.insert(tokens.end(), run.tokens().begin(), run.tokens().end());
      if (!run.sample()) continue;
      if (run.also_sample_size() > 0) prompts_[run.sequence()] = tokens;
      add(result, run.sequence(), next_token(tokens));
      for (const auto& choice : run.also_sample()) {
        add(result, choice.sequence(), (next_token(tokens) + choice.sampling().choice()) % kVocab);
      }
    }
  }

  static void add(control::StepResult& result, std::uint64_t sequence, std::int32_t token) {
    auto& sampled = *result.add_sampled();
    sampled.set_sequence(sequence);
    sampled.set_token(token);
  }

  std::vector<std::unique_ptr<kvstore::KvStore>> stores_;
  std::map<std::uint64_t, std::vector<std::int32_t>> tokens_;
  std::map<std::uint64_t, std::vector<std::int32_t>> prompts_;  // of sequences that others fork
};

SchedulerConfig small_config(int max_in_flight) {
  SchedulerConfig config;
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = 20;
  config.max_in_flight = max_in_flight;
  config.max_num_queued_reqs = 10;
  config.max_num_queued_tokens = 1000;
  config.eos_token_ids = {kEos};
  config.limits = {kVocab, 200, 4, 5, 10};
  return config;
}

engine::EngineRequest request_of(int n_prompt, int max_tokens, int n_choices = 1) {
  engine::EngineRequest request;
  for (int i = 0; i < n_prompt; ++i) request.prompt_ids.push_back((i * 13 + n_prompt) % kVocab);
  request.sampling.max_tokens = max_tokens;
  request.sampling.n_choices = n_choices;
  return request;
}

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

TEST(Scheduler, DecodeTokensAreSpreadOverTheStages) {
  Scheduler scheduler(small_config(3), KvLedger(kShape, {{1, 100}, {1, 100}}));
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
  const auto finish = [&](const control::StepPlan& plan) {
    for (const auto& result : stages.run(plan)) ASSERT_TRUE(scheduler.on_result(result, 3).ok());
  };
  engine::EngineRequest request = request_of(5, 100);
  request.sampling.ignore_eos = true;
  ASSERT_TRUE(scheduler.submit(request, 1).ok());
  finish(*scheduler.next_step(1));
  const auto decode = scheduler.next_step(2);  // the first sequence alone
  ASSERT_EQ(decode->runs_size(), 1);
  ASSERT_TRUE(scheduler.submit(request, 2).ok());
  finish(*scheduler.next_step(2));                   // the second one's prompt
  EXPECT_FALSE(scheduler.next_step(3).has_value());  // waits for the first
  finish(*decode);
  EXPECT_EQ(scheduler.next_step(4)->runs_size(), 2);  // now both
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

struct Life {
  int n_ended = 0;
  std::map<int, std::vector<std::int32_t>> tokens;
  std::map<int, engine::FinishReason> finished;
  Status status;
};

// Submits, cancels and runs at random; results come back in step order per stage but late.
class RandomRun {
 public:
  RandomRun(unsigned seed, int max_in_flight)
      : random_(seed),
        capacities_{{2, 24}, {1, 14}},
        scheduler_(small_config(max_in_flight), KvLedger(kShape, capacities_)),
        stages_(capacities_) {}

  void run() {
    for (int i = 0; i < 2000; ++i) {
      act();
      check();
      if (testing::Test::HasFatalFailure()) return;
    }
    for (int i = 0; i < 5000 && !scheduler_.idle(); ++i) {
      step();
      deliver();
      check();
    }
    ASSERT_TRUE(scheduler_.idle()) << "requests starve";
    for (const auto& [handle, life] : lives_) {
      EXPECT_EQ(life.n_ended, 1) << "request " << handle;
    }
    for (std::size_t s = 0; s < capacities_.size(); ++s) {
      EXPECT_EQ(stages_.used_pages(s), 0);
      EXPECT_EQ(scheduler_.ledger().committed_pages(s), 0);
    }
  }

 private:
  void act() {
    ++now_;
    switch (random_() % 8) {
      case 0: {
        auto request =
            request_of(1 + static_cast<int>(random_() % 60), 1 + static_cast<int>(random_() % 40),
                       1 + static_cast<int>(random_() % 3));
        const auto handle = scheduler_.submit(std::move(request), now_);
        if (handle.ok()) lives_[*handle];
        break;
      }
      case 1:
        if (!lives_.empty() && random_() % 4 == 0) {
          auto it = lives_.begin();
          std::advance(it, static_cast<std::ptrdiff_t>(random_() % lives_.size()));
          if (random_() % 2 == 0) {
            scheduler_.cancel(it->first, now_);
          } else {
            scheduler_.finish_choice(it->first, static_cast<int>(random_() % 3), now_);
          }
        }
        break;
      case 2:
      case 3:
      case 4:
        step();
        break;
      default:
        deliver();
    }
  }

  void step() {
    const auto plan = scheduler_.next_step(now_);
    if (!plan) return;
    int n_tokens = 0;
    for (const auto& run : plan->runs()) n_tokens += run.tokens_size();
    ASSERT_LE(n_tokens, 20);
    for (auto& result : stages_.run(*plan)) late_.push_back(std::move(result));
    // What the stages hold or have promised is never more than the ledger's book.
    for (std::size_t s = 0; s < capacities_.size(); ++s) {
      ASSERT_LE(stages_.used_pages(s), scheduler_.ledger().committed_pages(s));
    }
  }

  void deliver() {
    if (late_.empty()) return;
    const Status status = scheduler_.on_result(late_.front(), now_);
    ASSERT_TRUE(status.ok()) << status.to_string();
    late_.pop_front();
  }

  void check() {
    for (const RequestEvents& events : scheduler_.take_events()) {
      Life& life = lives_.at(events.request);
      ASSERT_EQ(life.n_ended, 0) << "an event after the end";
      for (const engine::TokenEvent& event : events.tokens) {
        ASSERT_EQ(life.finished.count(event.choice), 0u) << "a token after the last";
        life.tokens[event.choice].push_back(event.token);
        if (event.finish != engine::FinishReason::kNone) life.finished[event.choice] = event.finish;
      }
      if (events.ended) ++life.n_ended;
    }
    for (std::size_t s = 0; s < capacities_.size(); ++s) {
      ASSERT_LE(scheduler_.ledger().committed_pages(s), capacities_[s].n_pages);
    }
    const engine::EngineStats stats = scheduler_.stats();
    ASSERT_EQ(stats.accepted, stats.finished + stats.failed + stats.cancelled +
                                  static_cast<std::uint64_t>(stats.running + stats.waiting));
    ASSERT_LE(stats.waiting, 10);
  }

  std::mt19937 random_;
  std::int64_t now_ = 0;
  std::vector<StageCapacity> capacities_;
  Scheduler scheduler_;
  SimulatedStages stages_;
  std::deque<control::StepResult> late_;
  std::map<engine::RequestHandle, Life> lives_;
};

TEST(Scheduler, RandomLivesEndOnceAndFreeEverything) {
  const unsigned seed = std::random_device{}();
  for (unsigned i = 0; i < 40; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    RandomRun(seed + i, 1 + static_cast<int>(i % 4)).run();
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace spindle::coordinator
