#include "kvstore/plan/kv_levels.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

Status check_levels(std::span<const LayerRatio> levels, const KvModel& model) {
  int next = 0;
  for (const LayerRatio& level : levels) {
    if (level.first_layer != next || level.n_layers < 1 ||
        level.n_layers > model.n_layers - level.first_layer) {
      return internal_error("KV levels: a range of " + std::to_string(level.n_layers) +
                            " layers from " + std::to_string(level.first_layer) +
                            " on where layer " + std::to_string(next) + " is next");
    }
    if (!(level.ratio >= 0) || !std::isfinite(level.ratio)) {
      return internal_error("KV levels: a ratio of " + std::to_string(level.ratio));
    }
    next += level.n_layers;
  }
  if (next != model.n_layers) {
    return internal_error("KV levels: ranges of " + std::to_string(next) +
                          " layers, the model has " + std::to_string(model.n_layers));
  }
  return ok_status();
}

std::size_t first_head(const LayerRatio& level, const KvModel& model) {
  return static_cast<std::size_t>(level.first_layer) * static_cast<std::size_t>(model.n_kv_heads);
}
std::size_t end_head(const LayerRatio& level, const KvModel& model) {
  return first_head(level, model) +
         static_cast<std::size_t>(level.n_layers) * static_cast<std::size_t>(model.n_kv_heads);
}

// A raw head's encoded window has positions, which its pages had not.
void drop_for_shorter_tail(HeadPlan& head, const KvModel& model, int sinks, std::int64_t n_tokens,
                           int planned_recent, int recent, const HeadErrors* errors) {
  const auto bytes = [&](int tokens) {
    return head_bytes(head, model, sinks, n_tokens, tail_length(tokens, n_tokens), errors);
  };
  const std::uint64_t planned = bytes(planned_recent);
  while (head.mode == KvMode::kEvict && head.n_keep > 0 && bytes(recent) > planned) --head.n_keep;
}

}  // namespace

Result<SequencePlan> plan_boundary(const KvPolicy& policy, const KvModel& model,
                                   const ProfileTable* table, const BoundaryReport& report,
                                   std::span<const LayerRatio> levels) {
  if (levels.empty()) return plan_boundary(policy, model, table, report);
  if (Status status = check_levels(levels, model); !status.ok()) return status;
  if (Status status = check_report(policy, model, table, report); !status.ok()) return status;

  std::vector<PlanSize> sizes;       // [n_levels]
  std::vector<double> layer_ratios;  // [n_layers]
  std::vector<double> ratios;        // distinct
  std::vector<std::size_t> plan_of;  // [n_levels] -> ratios, plans
  for (const LayerRatio& level : levels) {
    sizes.push_back(level_size(policy, model, table, report.n_tokens, level.ratio));
    const PlanSize& size = sizes.back();
    layer_ratios.insert(layer_ratios.end(), static_cast<std::size_t>(level.n_layers),
                        size.limited ? size.ratio : 1.0);
    const auto found = std::find(ratios.begin(), ratios.end(), level.ratio);
    plan_of.push_back(static_cast<std::size_t>(found - ratios.begin()));
    if (found == ratios.end()) ratios.push_back(level.ratio);
  }
  std::vector<SequencePlan> plans(ratios.size());
  for (std::size_t i = 0; i < levels.size(); ++i) {
    SequencePlan& plan = plans[plan_of[i]];
    if (!plan.heads.empty()) continue;
    auto planned = plan_with_size(policy, model, table, report, sizes[i], layer_ratios);
    if (!planned.ok()) return planned.status();
    plan = std::move(*planned);
  }

  SequencePlan composed = plans.front();
  for (const SequencePlan& plan : plans) composed.recent = std::min(composed.recent, plan.recent);
  const bool first = report.earlier == nullptr || is_uncompressed(*report.earlier);
  for (std::size_t i = 0; i < levels.size(); ++i) {
    const SequencePlan& plan = plans[plan_of[i]];
    for (std::size_t h = first_head(levels[i], model); h < end_head(levels[i], model); ++h) {
      composed.heads[h] = plan.heads[h];
      if (!first || plan.recent == composed.recent) continue;
      drop_for_shorter_tail(composed.heads[h], model, composed.sinks, report.n_tokens, plan.recent,
                            composed.recent, table == nullptr ? nullptr : &table->heads[h]);
    }
  }
  return composed;
}

}  // namespace spindle::kvstore
