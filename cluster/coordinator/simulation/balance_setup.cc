#include "cluster/coordinator/simulation/balance_setup.h"

#include <utility>

namespace spindle::coordinator::simulation {

Result<std::optional<SimulatedBalance>> make_balance(const BalanceSettings& settings,
                                                     const SimulationConfig& cluster) {
  const SchedulerConfig& scheduler = cluster.scheduler;
  const kvstore::ProfileTable* table = scheduler.profile_table.get();
  auto ladder = kvstore::level_ladder(settings.policy, scheduler.kv_model, table,
                                      settings.typical_tokens, settings.ladder);
  if (!ladder.ok()) return ladder.status();
  if (ladder->size() < 2) return std::optional<SimulatedBalance>();
  std::vector<kvstore::LayerSpan> spans;
  BalancerConfig config;
  int first_layer = 0;
  for (const StageCapacity& stage : cluster.stages) {
    spans.push_back({first_layer, stage.n_layers});
    first_layer += stage.n_layers;
    config.token_bytes.push_back(cluster.shape.token_bytes() *
                                 static_cast<std::uint64_t>(cluster.shape.n_kv_heads) *
                                 static_cast<std::uint64_t>(stage.n_layers));
  }
  auto curves = kvstore::level_curves(settings.policy, scheduler.kv_model, table,
                                      settings.typical_tokens, *ladder, spans);
  if (!curves.ok()) return curves.status();
  config.curves = *std::move(curves);
  config.own_level = static_cast<int>(ladder->own);
  config.typical_tokens = settings.typical_tokens;
  config.max_num_seqs = scheduler.max_num_seqs;
  config.steps_ahead = static_cast<std::uint64_t>(scheduler.max_in_flight) + 1;
  config.warmup_us = settings.warmup_us;
  config.warmup_steps = settings.warmup_steps;
  config.cooldown_us = settings.cooldown_us;
  config.relief_hold_us = settings.relief_hold_us;
  config.smoothing_us = settings.smoothing_us;
  const int own_level = config.own_level;
  auto balancer = BudgetBalancer::make(std::move(config));
  if (!balancer.ok()) return balancer.status();
  return std::optional(SimulatedBalance{*std::move(balancer), *std::move(ladder), own_level});
}

}  // namespace spindle::coordinator::simulation
