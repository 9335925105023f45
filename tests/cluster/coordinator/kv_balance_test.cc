// The balancer as it is made from a cluster's stages and its default policy.

#include "cluster/coordinator/kv_balance.h"

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

namespace spindle::coordinator {
namespace {

constexpr std::int64_t kSecond = 1'000'000;

KvBalance balance_of(double step) {
  KvBalanceOptions options;
  options.ladder = {.step = step, .n_lighter = 2, .n_stronger = 60};
  options.typical_tokens = 4000;
  options.warmup_us = 0;
  options.warmup_steps = 0;
  SchedulerConfig scheduler;
  scheduler.max_num_seqs = 1000;
  scheduler.kv_model = {.n_layers = 4,
                        .n_heads = 8,
                        .n_kv_heads = 2,
                        .head_dim = 64,
                        .vocab_size = 1000,
                        .max_model_len = 8000};
  const kvstore::KvPolicy policy{.profile = kvstore::KvProfile::kSnapKv, .best_effort = true};
  const std::vector<StageCapacity> stages = {{2, 1000}, {2, 1000}};
  auto made = make_kv_balance(options, policy, scheduler, stages);
  EXPECT_TRUE(made.ok()) << made.status().to_string();
  return **std::move(made);
}

// Under as much pressure as there can be, one plan takes a size to 9/16 of it at most, but by a
// level at least: 18 levels of 3 %, 2 of a quarter, 1 of a half.
TEST(KvBalance, OnePlanChangesASizeByABoundedShare) {
  for (const auto& [step, n_levels] :
       {std::pair(0.97, 18), std::pair(0.75, 2), std::pair(0.5, 1)}) {
    SCOPED_TRACE(step);
    KvBalance balance = balance_of(step);
    const std::uint64_t capacity = 60'000'000;
    std::vector<BudgetReport> reports(2);
    std::vector<LedgerUse> ledger(2, {.committed_bytes = capacity, .capacity_bytes = capacity});
    for (std::uint32_t s = 0; s < 2; ++s) {
      reports[s] = {.stage = s, .n_stages = 2, .capacity_bytes = capacity};
    }
    std::optional<BudgetDecision> decision;
    for (int i = 1; i <= 20 && !decision; ++i) {
      auto decided = balance.balancer.decide({.now_us = i * kSecond,
                                              .next_step = static_cast<std::uint64_t>(i) * 50,
                                              .reports = reports,
                                              .ledger = ledger,
                                              .n_running = 500,
                                              .n_waiting = 500,
                                              .mean_tokens = 4000});
      ASSERT_TRUE(decided.ok()) << decided.status().to_string();
      decision = std::move(*decided);
    }
    ASSERT_TRUE(decision);
    const std::size_t own = balance.ladder.own;
    ASSERT_GT(balance.ladder.size(), own + static_cast<std::size_t>(n_levels) + 1);
    EXPECT_EQ(decision->plan.levels[0], own + static_cast<std::size_t>(n_levels));
    EXPECT_EQ(decision->plan.levels[1], own + static_cast<std::size_t>(n_levels));
  }
}

}  // namespace
}  // namespace spindle::coordinator
