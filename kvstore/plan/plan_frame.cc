#include "kvstore/plan/plan_frame.h"

#include <algorithm>

namespace spindle::kvstore {
namespace {

// A profile's own size grows to this many uncompressed tokens: what a sequence costs beside its
// tokens (sinks, window, means, partly filled blocks) would be most of a short prompt's share.
constexpr std::int64_t kSoftTokens = 128;

std::uint64_t soft_bytes(const KvModel& model) {
  return full_bytes(model, kSoftTokens) + kAllowancePages * page_bytes(model);
}

// None: by codec or threshold alone.
std::optional<double> own_ratio(const KvPolicy& policy, const ProfileTable* table) {
  switch (policy.profile) {
    case KvProfile::kSpindle:
      return table != nullptr ? 0.10 : 0.15;
    case KvProfile::kStreaming:
      if (policy.window > 0) return std::nullopt;
      return 0.25;
    case KvProfile::kSpindleKv:
    case KvProfile::kSnapKv:
    case KvProfile::kPyramidKv:
    case KvProfile::kKeyDiff:
    case KvProfile::kDefensive:
      return 0.25;
    case KvProfile::kFull:
    case KvProfile::kSimLayerKv:
    case KvProfile::kSimLayerKvInt4:
    case KvProfile::kInt4:
    case KvProfile::kKivi4:
    case KvProfile::kKivi2:
      return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace

bool in_range(const HeadOverride& range, int layer, int kv_head) {
  return layer >= range.first_layer && layer <= range.last_layer &&
         (range.kv_head < 0 || range.kv_head == kv_head);
}

bool is_simlayer(KvProfile profile) {
  return profile == KvProfile::kSimLayerKv || profile == KvProfile::kSimLayerKvInt4;
}

bool is_global(KvProfile profile) {
  return profile == KvProfile::kSpindle || profile == KvProfile::kDefensive;
}

std::int64_t lazy_window(const KvPolicy& policy) {
  return policy.window > 0 ? policy.window : kDefaultLazyWindow;
}

KvSelector profile_selector(KvProfile profile) {
  switch (profile) {
    case KvProfile::kSpindle:
    case KvProfile::kDefensive:
      return KvSelector::kDefensive;
    case KvProfile::kSpindleKv:
      return KvSelector::kSpindleKv;
    case KvProfile::kSnapKv:
    case KvProfile::kPyramidKv:
      return KvSelector::kSnapKvMean;
    case KvProfile::kKeyDiff:
      return KvSelector::kKeyDiff;
    case KvProfile::kFull:
    case KvProfile::kSimLayerKv:
    case KvProfile::kSimLayerKvInt4:
    case KvProfile::kStreaming:
    case KvProfile::kInt4:
    case KvProfile::kKivi4:
    case KvProfile::kKivi2:
      return KvSelector::kNone;
  }
  return KvSelector::kNone;
}

std::vector<KvSelector> policy_selectors(const KvPolicy& policy, const KvModel& model) {
  std::vector<KvSelector> distinct;
  for (int layer = 0; layer < model.n_layers; ++layer) {
    for (int head = 0; head < model.n_kv_heads; ++head) {
      KvSelector selector = profile_selector(policy.profile);
      for (const HeadOverride& range : policy.overrides) {
        if (!in_range(range, layer, head)) continue;
        if (range.selector) selector = *range.selector;
      }
      if (selector == KvSelector::kNone) continue;
      if (std::find(distinct.begin(), distinct.end(), selector) == distinct.end()) {
        distinct.push_back(selector);
      }
    }
  }
  if (distinct.empty()) distinct.push_back(KvSelector::kNone);
  return distinct;
}

std::uint64_t PlanSize::budget(const KvModel& model) const {
  if (!limited) return kNoLimit;
  const std::uint64_t allowance = kAllowancePages * page_bytes(model);
  return bytes > allowance ? bytes - allowance : 0;
}

PlanSize plan_size(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                   std::int64_t n_tokens) {
  const auto full = static_cast<double>(full_bytes(model, n_tokens));
  PlanSize size;
  if (policy.max_bytes > 0) {
    size = {.limited = true,
            .soft = policy.best_effort,
            .bytes = policy.max_bytes,
            .ratio = static_cast<double>(policy.max_bytes) / full};
  } else if (const auto own = own_ratio(policy, table); policy.ratio > 0 || own) {
    size.limited = true;
    size.soft = policy.best_effort || policy.ratio <= 0;
    size.ratio = policy.ratio > 0 ? policy.ratio : *own;
    size.bytes = static_cast<std::uint64_t>(size.ratio * full);
    // Pages are rounded up, and everything is still everything.
    if (policy.profile == KvProfile::kFull && policy.ratio >= 1.0) size = {};
  }
  if (size.soft) size.bytes = std::max(size.bytes, soft_bytes(model));
  return size;
}

PlanSize level_size(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                    std::int64_t n_tokens, double ratio) {
  const PlanSize own = plan_size(policy, model, table, n_tokens);
  if (ratio <= 0) return own;
  const double bytes = ratio * static_cast<double>(full_bytes(model, n_tokens));
  if (own.limited && !own.soft) {
    return {.limited = true,
            .soft = true,
            .bytes = std::min(static_cast<std::uint64_t>(bytes), own.bytes),
            .ratio = std::min(ratio, own.ratio)};
  }
  const double least = std::min(1.0, ratio / own.ratio) * static_cast<double>(soft_bytes(model));
  return {.limited = true,
          .soft = true,
          .bytes = static_cast<std::uint64_t>(std::max(bytes, least)),
          .ratio = ratio};
}

std::int64_t PlanFrame::window_in_body() const {
  const std::int64_t tail_begin = n_tokens() - tail();
  return std::max<std::int64_t>(tail_begin - (n_tokens() - kObservationWindow), 0);
}

std::uint64_t PlanFrame::cost(std::size_t head, const HeadPlan& plan) const {
  const HeadErrors* calibrated = errors(head);
  const std::int64_t n_ids = report.n_new_ids;
  if (!later) return head_bytes(plan, model, policy.sinks, n_tokens(), tail(), calibrated, n_ids);
  // The tail is as long as it was, and so are windows, which roll.
  const std::int64_t entering = std::max<std::int64_t>(report.n_new_tokens - tail(), 0);
  if (plan.mode == KvMode::kStream || (plan.mode == KvMode::kFull && plan.codec == kRawCodec)) {
    return 0;
  }
  if (plan.mode == KvMode::kFull) return head_block_bytes(plan, model, entering, calibrated, n_ids);
  const std::int64_t group =
      plan.selector == KvSelector::kSpindleKv ? model.n_heads / model.n_kv_heads : 1;
  const std::int64_t window = std::min(window_in_body(), entering);
  const std::int64_t kept = std::min(plan.n_keep * group, entering - window);
  return head_block_bytes(plan, model, kept + window, calibrated);
}

std::uint64_t PlanFrame::cost(std::span<const HeadPlan> heads) const {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < heads.size(); ++i) bytes += cost(i, heads[i]);
  return bytes;
}

HeadPlan PlanFrame::evict(kernels::KvCodec codec, std::int64_t n_keep) const {
  const std::int64_t kept = std::clamp<std::int64_t>(n_keep, 0, n_candidates());
  if (kept >= n_candidates() && !later) return {.codec = codec};
  return {.mode = KvMode::kEvict, .selector = selector, .codec = codec, .n_keep = kept};
}

// Nothing happens to a sequence that the window all but covers.
HeadPlan PlanFrame::stream(kernels::KvCodec codec, std::int64_t window) const {
  if (n_tokens() <= policy.sinks + window + 1) return {.codec = codec};
  return {.mode = KvMode::kStream, .codec = codec, .window = window};
}

std::uint64_t PlanFrame::tail_bytes() const {
  const bool tokens = policy.profile == KvProfile::kSpindle && model.token_table;
  const int n_heads = model.n_tables() - (tokens ? model.n_kv_heads : 0);
  const std::int64_t pages =
      (tail() + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens * n_heads;
  return static_cast<std::uint64_t>(pages) * page_bytes(model);
}

}  // namespace spindle::kvstore
