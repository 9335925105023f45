#include "worker/pipeline/budget_exchange.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "cluster/comm/local_group.h"

namespace spindle::worker {
namespace {

using coordinator::BudgetPlan;
using coordinator::BudgetReport;
using std::chrono::milliseconds;

class BudgetExchangeTest : public ::testing::Test {
 protected:
  static constexpr int kRanks = 3;

  void start(BudgetExchange::Decide decide, milliseconds timeout = milliseconds(20000)) {
    for (int rank = 0; rank < kRanks; ++rank) {
      exchanges_.push_back(std::make_unique<BudgetExchange>(cluster_.device(rank), timeout));
    }
    exchanges_.front()->set_decide(std::move(decide));
    for (auto& exchange : exchanges_) exchange->start();
  }
  Status report(int rank, std::uint64_t step) {
    BudgetReport report;
    report.stage = static_cast<std::uint32_t>(rank);
    report.n_stages = kRanks;
    report.step = step;
    report.capacity_bytes = 1000;
    report.used_bytes = 100 * static_cast<std::uint64_t>(rank);
    return exchanges_[static_cast<std::size_t>(rank)]->report(report);
  }

  comm::LocalCluster cluster_{kRanks};
  std::vector<std::unique_ptr<BudgetExchange>> exchanges_;
};

TEST_F(BudgetExchangeTest, EveryRoundReachesRankZeroAndItsPlanReachesAll) {
  std::atomic<std::uint64_t> n_rounds{0};
  start([&](std::span<const BudgetReport> reports) -> Result<BudgetPlan> {
    const std::uint64_t round = ++n_rounds;
    EXPECT_EQ(reports.size(), 3u);
    for (std::size_t rank = 0; rank < reports.size(); ++rank) {
      EXPECT_EQ(reports[rank].stage, rank);
      EXPECT_EQ(reports[rank].step, 10 * round);
      EXPECT_EQ(reports[rank].used_bytes, 100 * rank);
    }
    BudgetPlan plan;
    plan.n_stages = kRanks;
    plan.epoch = round / 2;  // every other round decides
    plan.effective_step = 10 * round;
    plan.levels[1] = static_cast<std::uint8_t>(plan.epoch);
    return plan;
  });
  for (std::uint64_t round = 1; round <= 20; ++round) {
    for (int rank = 0; rank < kRanks; ++rank) ASSERT_TRUE(report(rank, 10 * round).ok());
  }
  for (auto& exchange : exchanges_) {
    EXPECT_TRUE(exchange->await(0, 1).ok());
    EXPECT_TRUE(exchange->await(3, 1000).ok());
    EXPECT_TRUE(exchange->await(10, 200).ok());
    // A plan that the ranks would apply at different steps.
    EXPECT_EQ(exchange->await(10, 199).code(), StatusCode::kInternal);
  }
  for (auto& exchange : exchanges_) exchange->stop();
  EXPECT_EQ(n_rounds, 20u);
}

TEST_F(BudgetExchangeTest, WhatWasPromisedIsDoneWhenRanksStop) {
  std::atomic<int> n_rounds{0};
  start([&](std::span<const BudgetReport>) -> Result<BudgetPlan> {
    ++n_rounds;
    BudgetPlan plan;
    plan.n_stages = kRanks;
    return plan;
  });
  ASSERT_TRUE(report(0, 1).ok());
  ASSERT_TRUE(report(1, 1).ok());
  std::thread first([&] { exchanges_[0]->stop(); });
  std::thread second([&] { exchanges_[1]->stop(); });
  ASSERT_TRUE(report(2, 1).ok());
  first.join();
  second.join();
  exchanges_[2]->stop();
  EXPECT_EQ(n_rounds, 1);
}

TEST_F(BudgetExchangeTest, ADecisionThatFailsFailsOnEveryRank) {
  start([](std::span<const BudgetReport>) -> Result<BudgetPlan> {
    return internal_error("no idea");
  });
  for (int rank = 0; rank < kRanks; ++rank) ASSERT_TRUE(report(rank, 1).ok());
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_FALSE(exchanges_[static_cast<std::size_t>(rank)]->await(1, 1).ok());
    EXPECT_FALSE(report(rank, 2).ok());
  }
}

TEST_F(BudgetExchangeTest, ARankThatNeverReportsIsADeadline) {
  start([](std::span<const BudgetReport>) -> Result<BudgetPlan> { return BudgetPlan{}; },
        milliseconds(200));
  ASSERT_TRUE(report(0, 1).ok());
  const auto started = std::chrono::steady_clock::now();
  EXPECT_FALSE(exchanges_[0]->await(1, 1).ok());
  EXPECT_LT(std::chrono::steady_clock::now() - started, std::chrono::seconds(10));
}

}  // namespace
}  // namespace spindle::worker
