#include "cluster/coordinator/kv_balance.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace spindle::coordinator {
namespace {

// One plan changes a size to no less than this share of what it was, but by a level at least.
constexpr double kMostChange = 0.5625;
constexpr double kRounding = 1e-9;

int levels_in_one_plan(double step) {
  return std::max(1, static_cast<int>(std::log(kMostChange) / std::log(step) + kRounding));
}

}  // namespace

Result<std::optional<KvBalance>> make_kv_balance(const KvBalanceOptions& options,
                                                 const kvstore::KvPolicy& policy,
                                                 const SchedulerConfig& scheduler,
                                                 std::span<const StageCapacity> stages) {
  const std::optional<KvBalance> nothing;
  if (policy.profile == kvstore::KvProfile::kFull || stages.size() > kMaxBudgetStages) {
    return nothing;
  }
  const kvstore::KvModel& model = scheduler.kv_model;
  const kvstore::ProfileTable* table = scheduler.profile_table.get();
  const std::int64_t n_tokens = options.typical_tokens > 0
                                    ? options.typical_tokens
                                    : std::max<std::int64_t>(model.max_model_len / 2, 1);
  if (Status status = kvstore::validate_policy(policy, model, n_tokens, table); !status.ok()) {
    return status.with_context("kv.balance.typical_tokens, " + std::to_string(n_tokens));
  }
  auto ladder = kvstore::level_ladder(policy, model, table, n_tokens, options.ladder);
  if (!ladder.ok()) return ladder.status();
  if (ladder->size() < 2) return nothing;
  std::vector<kvstore::LayerSpan> spans;
  BalancerConfig config;
  int first_layer = 0;
  for (const StageCapacity& stage : stages) {
    spans.push_back({first_layer, stage.n_layers});
    first_layer += stage.n_layers;
    config.token_bytes.push_back(
        static_cast<std::uint64_t>(stage.n_layers) * static_cast<std::uint64_t>(model.n_kv_heads) *
        2 * static_cast<std::uint64_t>(model.head_dim) * dtype_bytes(model.dtype));
  }
  auto curves = kvstore::level_curves(policy, model, table, n_tokens, *ladder, spans);
  if (!curves.ok()) return curves.status();
  config.curves = std::move(*curves);
  config.own_level = static_cast<int>(ladder->own);
  config.typical_tokens = n_tokens;
  config.max_num_seqs = scheduler.max_num_seqs;
  config.steps_ahead = static_cast<std::uint64_t>(scheduler.max_in_flight) + 1;
  config.lighter_levels = options.lighter_levels;
  config.max_levels_moved = levels_in_one_plan(options.ladder.step);
  config.warmup_us = options.warmup_us;
  config.warmup_steps = options.warmup_steps;
  config.cooldown_us = options.cooldown_us;
  config.relief_hold_us = options.relief_hold_us;
  config.smoothing_us = options.smoothing_us;
  config.relief_margin = options.relief_margin;
  auto balancer = BudgetBalancer::make(std::move(config));
  if (!balancer.ok()) return balancer.status();
  return std::optional(KvBalance{std::move(*balancer), std::move(*ladder)});
}

}  // namespace spindle::coordinator
