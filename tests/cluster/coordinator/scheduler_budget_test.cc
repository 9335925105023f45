// Levels in the scheduler: when they apply, and that what is computed anew keeps them.

#include "tests/cluster/coordinator/balancer_fixture.h"
#include "tests/cluster/coordinator/simulated_stages.h"

namespace spindle::coordinator {
namespace {

const std::vector<StageCapacity> kStages = {{2, 400}, {1, 30}};

BudgetBalancer balancer_of(std::uint64_t steps_ahead = 1) {
  BalancerConfig config = testing::config_of(2);
  config.steps_ahead = steps_ahead;
  config.warmup_us = 0;
  config.warmup_steps = 0;
  config.cooldown_us = 0;
  config.smoothing_us = 1;
  config.token_bytes = {64 * 2 * 2, 64 * 2};
  config.curves = {testing::geometric_curve(64'000, 0.75, 6),
                   testing::geometric_curve(32'000, 0.75, 6)};
  return testing::make(config);
}

kvstore::LevelLadder ladder() { return {.ratios = {0.5, 0.375, 0.28, 0.21, 0.16, 0.12}, .own = 0}; }

engine::EngineRequest evicting(int n_prompt, int max_tokens) {
  engine::EngineRequest request = request_of(n_prompt, max_tokens);
  request.kv_policy.profile = kvstore::KvProfile::kSnapKv;
  request.kv_policy.ratio = 0.5;
  request.kv_policy.best_effort = true;
  request.kv_policy.recent = 32;
  request.sampling.ignore_eos = true;
  return request;
}

class SchedulerBudgetTest : public ::testing::Test {
 protected:
  SchedulerBudgetTest() : driver_(config(), kStages) {
    driver_.scheduler().set_balancer(balancer_of(), ladder());
  }
  static SchedulerConfig config() {
    SchedulerConfig config = kv_config(2);
    config.budget_report_steps = 4;
    return config;
  }
  // The stages' reports, as of the books.
  std::optional<BudgetDecision> balance() {
    std::vector<BudgetReport> reports;
    const std::uint64_t page = kShape.page_bytes();
    for (std::size_t s = 0; s < kStages.size(); ++s) {
      BudgetReport report;
      report.stage = static_cast<std::uint32_t>(s);
      report.n_stages = 2;
      report.epoch = driver_.scheduler().budget_plan().epoch;
      report.capacity_bytes = static_cast<std::uint64_t>(kStages[s].n_pages) * page;
      reports.push_back(report);
    }
    auto decision = driver_.scheduler().balance(reports, driver_.now() += testing::kSecond);
    EXPECT_TRUE(decision.ok()) << decision.status().to_string();
    return decision.ok() ? *decision : std::nullopt;
  }
  // More requests than fit, until the balancer moves.
  std::optional<BudgetDecision> press() {
    for (int i = 0; i < 10; ++i) EXPECT_TRUE(driver_.submit(evicting(300, 200)).ok());
    std::optional<BudgetDecision> decision;
    for (int i = 0; i < 4 && !decision; ++i) {
      driver_.step();
      driver_.deliver_all();
      decision = balance();
    }
    return decision;
  }
  // Plans of the heads by request, in the order of the boundaries.
  std::vector<std::vector<std::string>> plans_of(const Life& life) {
    std::vector<std::vector<std::string>> plans;
    for (const engine::BoundaryUse& use : life.summary.boundaries) {
      std::vector<std::string>& heads = plans.emplace_back();
      for (const engine::HeadKvUse& head : use.heads) {
        heads.push_back(head.plan + " " + std::to_string(head.kept_tokens));
      }
    }
    return plans;
  }

  Driver driver_;
};

TEST_F(SchedulerBudgetTest, ReportsAreAskedForOneAtATime) {
  ASSERT_TRUE(driver_.submit(evicting(300, 100)).ok());
  int n_asked = 0;
  for (int i = 0; i < 30; ++i) {
    const auto plan = driver_.step();
    driver_.deliver_all();
    if (!plan) break;
    EXPECT_EQ(plan->budget_epoch(), 0u);
    n_asked += plan->report_budget() ? 1 : 0;
  }
  EXPECT_EQ(n_asked, 1) << "the first ones are not here";
  balance();
  for (int i = 0; i < 6; ++i) {
    const auto plan = driver_.step();
    driver_.deliver_all();
    if (plan && plan->report_budget()) ++n_asked;
  }
  EXPECT_EQ(n_asked, 2);
}

TEST_F(SchedulerBudgetTest, PressureMakesTheTightStageKeepLessFromANumberedStepOn) {
  const auto decision = press();
  ASSERT_TRUE(decision.has_value());
  EXPECT_GT(decision->plan.levels[1], decision->plan.levels[0]) << decision->reason;
  EXPECT_FALSE(decision->reason.empty());
  bool applied = false;
  for (int i = 0; i < 20000; ++i) {
    const auto plan = driver_.step();
    const bool late = driver_.has_late();
    driver_.deliver_all();
    if (!plan && !late) break;
    if (!plan) continue;
    const bool in_effect = plan->step() >= decision->plan.effective_step;
    EXPECT_EQ(plan->budget_epoch(), in_effect ? 1u : 0u) << "step " << plan->step();
    applied |= in_effect;
  }
  EXPECT_TRUE(applied);
  // The last ones were planned by the levels: the second stage's heads keep less than the first's.
  const Life& last = driver_.lives().rbegin()->second;
  ASSERT_TRUE(last.status.ok()) << last.status.to_string();
  ASSERT_EQ(last.summary.boundaries.size(), 1u);
  const auto& heads = last.summary.boundaries[0].heads;
  EXPECT_LT(heads[2].kept_tokens, heads[0].kept_tokens);
  driver_.expect_nothing_left();
}

TEST_F(SchedulerBudgetTest, ASizeThatARequestAskedForIsItsOwn) {
  const auto decision = press();
  ASSERT_TRUE(decision.has_value());
  driver_.run();
  engine::EngineRequest wish = evicting(300, 10);
  wish.kv_policy.best_effort = false;
  const auto wished = plans_of(driver_.run(wish));
  const auto levelled = plans_of(driver_.run(evicting(300, 10)));
  Driver plain(config(), kStages);
  EXPECT_EQ(wished, plans_of(plain.run(wish)));
  EXPECT_NE(levelled, wished);
}

TEST_F(SchedulerBudgetTest, BoundariesSayWhatTheCurvesDoForRequestsThatAreLevelled) {
  for (const bool is_levelled : {true, false}) {
    SCOPED_TRACE(is_levelled);
    engine::EngineRequest request = evicting(300, 4);
    request.kv_policy.best_effort = is_levelled;
    ASSERT_TRUE(driver_.submit(request).ok());
    int n_boundaries = 0;
    for (int i = 0; i < 100; ++i) {
      const auto plan = driver_.step();
      driver_.deliver_all();
      if (!plan) continue;
      for (const control::Compress& order : plan->compress()) {
        if (!order.selects()) continue;
        ++n_boundaries;
        ASSERT_EQ(order.planned_bytes_size(), is_levelled ? 2 : 0);
        if (!is_levelled) continue;
        const double share = 300.0 / static_cast<double>(testing::kTypical);
        EXPECT_NEAR(static_cast<double>(order.planned_bytes(0)), 64'000 * share, 1);
        EXPECT_NEAR(static_cast<double>(order.planned_bytes(1)), 32'000 * share, 1);
      }
    }
    EXPECT_EQ(n_boundaries, 1);
  }
}

TEST_F(SchedulerBudgetTest, AReportOfAPlanThatWasNeverMadeIsAnError) {
  std::vector<BudgetReport> reports(2);
  reports[1].stage = 1;
  for (BudgetReport& report : reports) {
    report.n_stages = 2;
    report.epoch = 7;
    report.capacity_bytes = 1000;
  }
  EXPECT_EQ(driver_.scheduler().balance(reports, 5).status().code(), StatusCode::kInternal);
}

}  // namespace
}  // namespace spindle::coordinator
