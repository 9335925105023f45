#include "worker/pipeline/stage_worker.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "cluster/comm/local_group.h"
#include "tests/worker/local_cluster.h"
#include "worker/daemon/topology.h"

namespace spindle::worker {
namespace {

// One stage with all layers, driven by hand.
class StageWorkerTest : public testing::Test {
 protected:
  void SetUp() override {
    RankSettings settings;
    settings.model_dir = mini_model_dir();
    settings.max_num_seqs = 2;
    settings.max_num_batched_tokens = 32;
    settings.worker.check_invariants = true;
    settings.worker.on_step = [this](std::uint64_t step) { last_step_ = step; };
    const auto topology = agree_on_topology(settings, groups_.host(0), Deadline::after_ms(60000));
    ASSERT_TRUE(topology.ok()) << topology.status().to_string();
    auto rank = RankRuntime::create(settings, *topology, groups_.host(0), groups_.device(0));
    ASSERT_TRUE(rank.ok()) << rank.status().to_string();
    rank_ = std::move(*rank);
    thread_ = std::thread([this] { ended_ = rank_->worker().run(); });
  }

  void TearDown() override {
    groups_.host(0).shutdown("the test is over");
    thread_.join();
  }

  control::StepResult run(const control::StepPlan& plan) {
    const Status sent = groups_.host(0).send(0, comm::Channel::kPlan, plan.SerializeAsString(),
                                             Deadline::after_ms(5000));
    EXPECT_TRUE(sent.ok());
    const auto message = groups_.host(0).recv(0, comm::Channel::kResult, Deadline::after_ms(30000));
    control::StepResult result;
    EXPECT_TRUE(message.ok() && result.ParseFromString(message->bytes));
    return result;
  }

  static control::StepPlan opening(std::uint64_t step, std::uint64_t sequence, int n_tokens) {
    control::StepPlan plan;
    plan.set_step(step);
    control::OpenSequence& open = *plan.add_open();
    open.set_sequence(sequence);
    open.set_max_tokens(100);
    open.add_reserve_pages(12 * 2 * 4);
    open.set_prompt_tokens(n_tokens);
    open.mutable_sampling()->set_top_p(1);
    open.mutable_sampling()->set_repetition_penalty(1);
    open.mutable_sampling()->set_n_logprobs(-1);
    control::Run& run = *plan.add_runs();
    run.set_sequence(sequence);
    for (int i = 0; i < n_tokens; ++i) run.add_tokens(100 + i);
    run.set_sample(true);
    return plan;
  }

  comm::LocalCluster groups_{1};
  std::unique_ptr<RankRuntime> rank_;
  Status ended_;
  std::atomic<std::uint64_t> last_step_{0};
  std::thread thread_;
};

TEST_F(StageWorkerTest, AStepReportsTokensAndBytes) {
  const control::StepResult result = run(opening(1, 5, 20));
  EXPECT_EQ(result.error(), "");
  ASSERT_EQ(result.sampled_size(), 1);
  EXPECT_EQ(result.sampled(0).sequence(), 5u);
  EXPECT_GE(result.sampled(0).token(), 0);
  EXPECT_EQ(result.kv_used_bytes(), 12u * 2 * 8192);  // one page a layer and head
  EXPECT_EQ(result.kv().layer_used_bytes_size(), 12);

  control::StepPlan free;
  free.set_step(2);
  free.add_free(5);
  const control::StepResult freed = run(free);
  ASSERT_EQ(freed.freed_size(), 1);
  EXPECT_EQ(freed.freed(0).full_bytes(), 20u * 6144);
  EXPECT_EQ(freed.freed(0).kept_bytes(), 12u * 2 * 8192);
  EXPECT_EQ(freed.kv_used_bytes(), 0u);
  EXPECT_GE(last_step_, 1u);  // the first step's report precedes the second step
}

TEST_F(StageWorkerTest, AStepReportsWhereItsTimeWent) {
  const control::StepResult first = run(opening(1, 5, 20));
  EXPECT_GT(first.busy_us(), 0u);
  EXPECT_EQ(first.empty_us(), 0u);  // the cluster was starting
  EXPECT_EQ(first.upstream_us() + first.downstream_us(), 0u);
  EXPECT_EQ(first.send_us() + first.receive_us(), 0u);
  EXPECT_EQ(first.compress_us(), 0u);
  EXPECT_EQ(first.kv().logical_tokens(), 20);
  EXPECT_EQ(first.kv().layer_full_bytes(), 20u * 6144 / 12);

  const auto wait = [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  control::StepPlan nothing;
  nothing.set_step(2);
  wait();
  const control::StepResult waited = run(nothing);
  EXPECT_GE(waited.empty_us(), 4900u);
  EXPECT_EQ(waited.busy_us(), 0u);
  // Without requests waiting is no bubble.
  nothing.set_step(3);
  nothing.set_idle_us(3'600'000'000);
  wait();
  EXPECT_EQ(run(nothing).empty_us(), 0u);

  control::StepPlan free;
  free.set_step(4);
  free.add_free(5);
  const control::StepResult freed = run(free);
  ASSERT_TRUE(freed.has_kv());
  EXPECT_EQ(freed.kv().logical_tokens(), 0);
  EXPECT_EQ(freed.kv().layer_plan(0), 0u);
}

TEST_F(StageWorkerTest, AForkGoesOnAsItsParentWould) {
  run(opening(1, 5, 20));
  control::StepPlan plan;
  plan.set_step(2);
  control::ForkSequence& fork = *plan.add_fork();
  fork.set_parent(5);
  fork.set_n_tokens(20);
  *fork.mutable_child() = opening(0, 6, 20).open(0);
  for (const std::uint64_t sequence : {5, 6}) {
    control::Run& run_of = *plan.add_runs();
    run_of.set_sequence(sequence);
    run_of.set_first_position(20);
    run_of.add_tokens(77);
    run_of.set_sample(true);
  }
  const control::StepResult result = run(plan);
  EXPECT_EQ(result.error(), "");
  ASSERT_EQ(result.sampled_size(), 2);
  EXPECT_EQ(result.sampled(0).token(), result.sampled(1).token());
}

TEST_F(StageWorkerTest, APlanThatCannotBeDoneIsReportedAndEndsTheStage) {
  control::StepPlan plan;
  plan.set_step(1);
  plan.add_free(99);
  EXPECT_NE(run(plan).error().find("99"), std::string::npos);
}

TEST_F(StageWorkerTest, AStepOverTheTokenLimitIsReported) {
  EXPECT_NE(run(opening(1, 5, 33)).error().find("33 tokens"), std::string::npos);
}

TEST_F(StageWorkerTest, ShutdownEndsInOrder) {
  control::StepPlan plan;
  plan.set_shutdown(true);
  ASSERT_TRUE(groups_.host(0)
                  .send(0, comm::Channel::kPlan, plan.SerializeAsString(), Deadline::after_ms(5000))
                  .ok());
  thread_.join();
  EXPECT_TRUE(ended_.ok());
  thread_ = std::thread([] {});
}

}  // namespace
}  // namespace spindle::worker
