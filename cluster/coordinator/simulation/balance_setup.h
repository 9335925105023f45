#pragma once
// The balancer of a simulated cluster, made from its stages and the policy of its requests, as the
// daemon makes it from what its ranks report. Pure.

#include <optional>

#include "cluster/coordinator/simulation/simulation.h"
#include "kernels/core/status.h"

namespace spindle::coordinator::simulation {

struct BalanceSettings {
  kvstore::LadderShape ladder;
  kvstore::KvPolicy policy;
  std::int64_t typical_tokens = 0;
  // As in BalancerConfig.
  std::int64_t warmup_us = 10'000'000;
  std::uint64_t warmup_steps = 32;
  std::int64_t cooldown_us = 5'000'000;
  std::int64_t relief_hold_us = 15'000'000;
  std::int64_t smoothing_us = 3'000'000;
};

// Nothing where the policy has no other sizes for prompts of the typical length. The status of
// level_ladder, level_curves or BudgetBalancer::make.
Result<std::optional<SimulatedBalance>> make_balance(const BalanceSettings& settings,
                                                     const SimulationConfig& cluster);

}  // namespace spindle::coordinator::simulation
