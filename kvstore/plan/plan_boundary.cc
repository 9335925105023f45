#include <algorithm>
#include <cmath>
#include <string>

#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

constexpr int kBlock = kernels::kKvBlockTokens;
// The tail may take this part of the budget.
constexpr std::uint64_t kTailPart = 10;
// Rounds in which a profile is given what its overrides leave.
constexpr int kOverrideRounds = 6;

// The lengths of the tail to try, longest first.
std::vector<int> tail_choices(const KvPolicy& policy) {
  std::int64_t longest = policy.recent;
  // A streaming head's tail is its window.
  const bool windowed = policy.profile == KvProfile::kStreaming || is_simlayer(policy.profile);
  if (windowed && policy.window > 0) longest = std::min(longest, policy.window);
  std::vector<int> choices = {static_cast<int>(longest) / kBlock * kBlock};
  if (choices.back() > kBlock) choices.push_back(kBlock);
  if (choices.back() > 0) choices.push_back(0);
  return choices;
}

void override_head(const PlanFrame& frame, const HeadOverride& range, HeadPlan& head) {
  if (range.codec) {
    head.codec = *range.codec;
    if (head.codec == kTokenCodec) head = {.codec = kTokenCodec};
  }
  std::optional<KvMode> mode = range.mode;
  if (!mode && range.keep_ratio) mode = KvMode::kEvict;
  if (!mode && range.window) mode = KvMode::kStream;
  if (!mode) return;
  if (*mode == KvMode::kFull) {
    head = {.codec = head.codec};
    return;
  }
  const kernels::KvCodec codec = head.codec == kTokenCodec ? kRawCodec : head.codec;
  if (*mode == KvMode::kStream) {
    head = frame.stream(codec, range.window.value_or(lazy_window(frame.policy)));
    return;
  }
  const double kept = range.keep_ratio.value_or(1.0) * static_cast<double>(frame.n_candidates());
  head = frame.evict(codec, static_cast<std::int64_t>(std::nearbyint(kept)));
}

// Overrides change what a profile's plan costs: it is planned again with what they leave.
std::vector<HeadPlan> plan_overridden(const PlanFrame& frame, std::uint64_t budget) {
  const auto plan_for = [&](std::uint64_t target) {
    std::vector<HeadPlan> plan = plan_profile(frame, target);
    apply_overrides(frame, plan);
    return plan;
  };
  std::vector<HeadPlan> best = plan_for(budget);
  if (frame.policy.overrides.empty() || budget == kNoLimit) return best;
  std::uint64_t target = budget;
  std::uint64_t bytes = frame.cost(best);
  std::uint64_t best_bytes = bytes;
  for (int round = 0; round < kOverrideRounds && bytes != budget; ++round) {
    if (bytes > budget) {
      target -= std::min(target, bytes - budget);
    } else {
      target += budget - bytes;
    }
    std::vector<HeadPlan> plan = plan_for(target);
    bytes = frame.cost(plan);
    const bool better =
        bytes <= budget ? best_bytes > budget || bytes > best_bytes : bytes < best_bytes;
    if (!better) continue;
    best = std::move(plan);
    best_bytes = bytes;
  }
  return best_bytes <= budget ? best : plan_for(0);
}

// What complete heads of layers that were planned more lightly cost beyond an equal share.
std::uint64_t lighter_excess(const PlanFrame& frame, std::span<const HeadPlan> heads,
                             std::uint64_t budget, std::span<const double> layer_ratios) {
  if (layer_ratios.empty()) return 0;
  const std::uint64_t share = budget / heads.size();
  std::uint64_t excess = 0;
  for (std::size_t i = 0; i < heads.size(); ++i) {
    const bool lighter = layer_ratios[static_cast<std::size_t>(frame.layer(i))] > frame.ratio;
    if (!lighter || heads[i].mode == KvMode::kEvict) continue;
    const std::uint64_t cost = frame.cost(i, heads[i]);
    excess += cost - std::min(cost, share);
  }
  return excess;
}

SequencePlan plan_later(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                        const BoundaryReport& report, const PlanSize& size,
                        std::span<const double> layer_ratios) {
  SequencePlan plan = *report.earlier;
  const PlanFrame frame{.policy = policy,
                        .model = model,
                        .table = table,
                        .report = report,
                        .selector = policy_selectors(policy, model).front(),
                        .ratio = size.ratio,
                        .recent = plan.recent,
                        .later = true};
  const std::int64_t entering = std::max<std::int64_t>(report.n_new_tokens - frame.tail(), 0);
  std::uint64_t budget = kNoLimit;
  if (size.limited) {
    budget = static_cast<std::uint64_t>(std::min(size.ratio, 1.0) *
                                        static_cast<double>(full_bytes(model, entering)));
    budget += lighter_excess(frame, plan.heads, budget, layer_ratios);
  }
  fill_evict(frame, budget, plan.heads);
  apply_overrides(frame, plan.heads);
  return plan;
}

}  // namespace

Status check_report(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                    const BoundaryReport& report) {
  const auto n_tables = static_cast<std::size_t>(model.n_tables());
  if (table != nullptr && table->heads.size() != n_tables) {
    return invalid_argument("the profile table has " + std::to_string(table->heads.size()) +
                            " heads, the model " + std::to_string(n_tables));
  }
  if (report.n_tokens < 1 || report.n_candidates < 0 || report.n_candidates > report.n_tokens) {
    return internal_error("a KV boundary report counts " + std::to_string(report.n_candidates) +
                          " candidates of " + std::to_string(report.n_tokens) + " tokens");
  }
  if (never_compressed(policy, report.n_tokens)) return ok_status();
  const BoundaryNeeds needs = boundary_needs(policy, model);
  if (needs.histograms && report.histograms.size() != n_tables) {
    return internal_error("a KV boundary report without its histograms");
  }
  const bool later = report.earlier != nullptr && !is_uncompressed(*report.earlier);
  if (needs.lazy_mass && !later &&
      report.lazy_mass.size() != static_cast<std::size_t>(model.n_layers)) {
    return internal_error("a KV boundary report without its lazy masses");
  }
  if (later && (report.n_new_tokens < 1 || report.n_new_tokens > report.n_tokens)) {
    return internal_error("a KV boundary report without its new tokens");
  }
  if (report.earlier != nullptr && report.earlier->heads.size() != n_tables) {
    return internal_error("a KV boundary report with another model's earlier plan");
  }
  return ok_status();
}

void apply_overrides(const PlanFrame& frame, std::vector<HeadPlan>& plan) {
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const int kv_head = static_cast<int>(i) % frame.model.n_kv_heads;
    for (const HeadOverride& range : frame.policy.overrides) {
      if (!in_range(range, frame.layer(i), kv_head)) continue;
      // Modes and codecs stay from boundary to boundary.
      if (frame.later && (plan[i].mode != KvMode::kEvict || !range.keep_ratio)) continue;
      const kernels::KvCodec codec = plan[i].codec;
      override_head(frame, range, plan[i]);
      if (frame.later) plan[i].codec = codec;
    }
  }
}

SizedPlan plan_sized(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                     const BoundaryReport& report, std::uint64_t budget, double ratio) {
  PlanFrame frame{.policy = policy,
                  .model = model,
                  .table = table,
                  .report = report,
                  .selector = policy_selectors(policy, model).front(),
                  .ratio = ratio};
  SizedPlan sized;
  for (const int recent : tail_choices(policy)) {
    frame.recent = recent;
    const bool limited = budget != kNoLimit;
    if (recent > 0 && limited && frame.tail_bytes() > budget / kTailPart) continue;
    sized.plan = {.sinks = policy.sinks, .recent = recent, .heads = plan_overridden(frame, budget)};
    sized.bytes = frame.cost(sized.plan.heads);
    if (sized.bytes <= budget) break;
  }
  return sized;
}

Result<SequencePlan> plan_with_size(const KvPolicy& policy, const KvModel& model,
                                    const ProfileTable* table, const BoundaryReport& report,
                                    const PlanSize& size, std::span<const double> layer_ratios) {
  const SequencePlan uncompressed = uncompressed_plan(policy, model);
  if (never_compressed(policy, report.n_tokens)) return uncompressed;
  if (report.earlier != nullptr && !is_uncompressed(*report.earlier)) {
    return plan_later(policy, model, table, report, size, layer_ratios);
  }
  const std::uint64_t budget = size.budget(model);
  const std::uint64_t all = plan_bytes(uncompressed, model, report.n_tokens, 0);
  // Prompts that are hardly longer than the least a profile's own size grows to.
  const bool evicts = profile_selector(policy.profile) != KvSelector::kNone ||
                      policy.profile == KvProfile::kStreaming;
  if (size.limited && size.soft && evicts && policy.overrides.empty() && all <= budget) {
    return uncompressed;
  }
  SizedPlan sized = plan_sized(policy, model, table, report, budget, size.ratio);
  if (sized.bytes <= budget) return std::move(sized.plan);
  if (size.soft) {
    if (sized.bytes < all) return std::move(sized.plan);
    return uncompressed;
  }
  return below_floor(policy, model, report.n_tokens,
                     floor_bytes(policy, model, table, report.n_tokens, report.n_new_ids));
}

Result<SequencePlan> plan_boundary(const KvPolicy& policy, const KvModel& model,
                                   const ProfileTable* table, const BoundaryReport& report) {
  if (Status status = check_report(policy, model, table, report); !status.ok()) return status;
  return plan_with_size(policy, model, table, report,
                        plan_size(policy, model, table, report.n_tokens));
}

}  // namespace spindle::kvstore
