#include "worker/daemon/kv_balance.h"

#include <algorithm>
#include <utility>

namespace spindle::worker {

Result<std::optional<KvBalance>> make_kv_balance(const KvBalanceOptions& options,
                                                 const kvstore::KvPolicy& policy,
                                                 const kvstore::KvModel& model,
                                                 const kvstore::ProfileTable* table,
                                                 const std::vector<control::StageInfo>& stages,
                                                 int max_num_seqs, int max_in_flight) {
  const std::optional<KvBalance> nothing;
  if (policy.profile == kvstore::KvProfile::kFull ||
      stages.size() > coordinator::kMaxBudgetStages) {
    return nothing;
  }
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
  coordinator::BalancerConfig config;
  for (const control::StageInfo& stage : stages) {
    spans.push_back({stage.first_layer(), stage.n_layers()});
    config.token_bytes.push_back(static_cast<std::uint64_t>(stage.n_layers()) *
                                 static_cast<std::uint64_t>(model.n_kv_heads) * 2 *
                                 static_cast<std::uint64_t>(model.head_dim) *
                                 dtype_bytes(model.dtype));
  }
  auto curves = kvstore::level_curves(policy, model, table, n_tokens, *ladder, spans);
  if (!curves.ok()) return curves.status();
  config.curves = std::move(*curves);
  config.own_level = static_cast<int>(ladder->own);
  config.typical_tokens = n_tokens;
  config.max_num_seqs = max_num_seqs;
  config.steps_ahead = static_cast<std::uint64_t>(max_in_flight) + 1;
  config.lighter_levels = options.lighter_levels;
  config.warmup_us = options.warmup_us;
  config.cooldown_us = options.cooldown_us;
  config.relief_hold_us = options.relief_hold_us;
  config.relief_margin = options.relief_margin;
  auto balancer = coordinator::BudgetBalancer::make(std::move(config));
  if (!balancer.ok()) return balancer.status();
  return std::optional(KvBalance{std::move(*balancer), std::move(*ladder)});
}

}  // namespace spindle::worker
