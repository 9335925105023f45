#pragma once
// The balancer of a cluster's KV budgets, made from what its stages and its default policy are.

#include <cstdint>
#include <optional>
#include <span>

#include "cluster/coordinator/budget_balancer.h"
#include "cluster/coordinator/kv_ledger.h"
#include "cluster/coordinator/scheduler.h"
#include "kernels/core/status.h"
#include "kvstore/plan/level_curves.h"

namespace spindle::coordinator {

// What is not said here is as in BalancerConfig; a plan moves a stage by as many levels as change
// its size to no less than 9/16 of what it was, at least one.
struct KvBalanceOptions {
  kvstore::LadderShape ladder;
  bool lighter_levels = false;
  std::int64_t typical_tokens = 0;  // of a prompt; 0: half of max_model_len
  std::int64_t warmup_us = 10'000'000;
  std::uint64_t warmup_steps = 32;
  std::int64_t cooldown_us = 5'000'000;
  std::int64_t relief_hold_us = 15'000'000;
  std::int64_t smoothing_us = 3'000'000;
  double relief_margin = 0.25;
};

struct KvBalance {
  BudgetBalancer balancer;
  kvstore::LevelLadder ladder;
};

// Nothing when there is nothing to balance: `policy` keeps everything, or has no other sizes for a
// typical prompt, or there are more stages than a plan holds. INVALID_ARGUMENT naming the field at
// fault. Thread-safety: pure.
Result<std::optional<KvBalance>> make_kv_balance(const KvBalanceOptions& options,
                                                 const kvstore::KvPolicy& policy,
                                                 const SchedulerConfig& scheduler,
                                                 std::span<const StageCapacity> stages);

}  // namespace spindle::coordinator
