#pragma once
// The balancer of a cluster's KV budgets, made from what its stages and its default policy are.

#include <cstdint>
#include <optional>
#include <vector>

#include "cluster/coordinator/budget_balancer.h"
#include "kernels/core/status.h"
#include "kvstore/plan/level_curves.h"
#include "proto/control.pb.h"

namespace spindle::worker {

struct KvBalanceOptions {
  kvstore::LadderShape ladder;
  bool lighter_levels = false;
  std::int64_t typical_tokens = 0;  // of a prompt; 0: half of max_model_len
  std::int64_t warmup_us = 10'000'000;
  std::int64_t cooldown_us = 5'000'000;
  std::int64_t relief_hold_us = 15'000'000;
  double relief_margin = 0.25;
};

struct KvBalance {
  coordinator::BudgetBalancer balancer;
  kvstore::LevelLadder ladder;
};

// Nothing when there is nothing to balance: the default policy keeps everything, or has no other
// sizes for a typical prompt. INVALID_ARGUMENT naming the field at fault. Thread-safety: pure.
Result<std::optional<KvBalance>> make_kv_balance(const KvBalanceOptions& options,
                                                 const kvstore::KvPolicy& policy,
                                                 const kvstore::KvModel& model,
                                                 const kvstore::ProfileTable* table,
                                                 const std::vector<control::StageInfo>& stages,
                                                 int max_num_seqs, int max_in_flight);

}  // namespace spindle::worker
