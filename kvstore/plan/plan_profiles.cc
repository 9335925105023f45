// The profiles that need no calibration.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/core/check.h"
#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

// Steps of the share that evicting profiles are searched over: finer than one token of any context.
constexpr std::int64_t kShareSteps = std::int64_t{1} << 22;

std::vector<HeadPlan> complete(const PlanFrame& frame, kernels::KvCodec codec) {
  return std::vector<HeadPlan>(static_cast<std::size_t>(frame.model.n_tables()),
                               HeadPlan{.codec = codec});
}

// What a profile keeps in a layer at a share of the context.
std::int64_t kept_at(const PlanFrame& frame, double share, int layer) {
  const std::int64_t candidates = frame.n_candidates();
  const int n_layers = frame.model.n_layers;
  switch (frame.policy.profile) {
    case KvProfile::kPyramidKv: {
      const std::int64_t context = candidates + kObservationWindow;
      return kernels::pyramidkv_kept(context, share, kObservationWindow, layer, n_layers) -
             kObservationWindow;
    }
    case KvProfile::kSpindleKv: {
      const double ratio = kernels::spindlekv_layer_ratio(share, layer, n_layers);
      const double kept = std::nearbyint(ratio * static_cast<double>(candidates));
      return std::max<std::int64_t>(1, static_cast<std::int64_t>(kept));
    }
    default:
      return static_cast<std::int64_t>(std::floor(share * static_cast<double>(candidates)));
  }
}

// A codebook, in place of which the store keeps tokens as they are where it saves nothing.
HeadPlan with_codebook(const PlanFrame& frame, std::int64_t n_keep) {
  HeadPlan plan = frame.evict(kCodebookCodec, n_keep);
  plan.fallback = kernels::KvFormat::kRaw;
  return plan;
}

// The kept share is one number; the largest that fits.
template <typename Build>
std::vector<HeadPlan> largest_share(const PlanFrame& frame, std::uint64_t budget,
                                    const Build& build) {
  const auto at = [&](std::int64_t step) {
    return build(static_cast<double>(step) / static_cast<double>(kShareSteps));
  };
  std::vector<HeadPlan> best = at(kShareSteps);
  if (frame.cost(best) <= budget) return best;
  best = at(0);
  std::int64_t fits = 0;
  std::int64_t too_large = kShareSteps;
  while (fits + 1 < too_large) {
    const std::int64_t step = std::midpoint(fits, too_large);
    std::vector<HeadPlan> plan = at(step);
    if (frame.cost(plan) <= budget) {
      fits = step;
      best = std::move(plan);
    } else {
      too_large = step;
    }
  }
  return best;
}

std::vector<HeadPlan> plan_evicting(const PlanFrame& frame, std::uint64_t budget) {
  return largest_share(frame, budget, [&](double share) {
    std::vector<HeadPlan> plan = complete(frame, kRawCodec);
    for (std::size_t i = 0; i < plan.size(); ++i) {
      const std::int64_t n_keep = kept_at(frame, share, frame.layer(i));
      plan[i] = frame.policy.profile == KvProfile::kSpindleKv ? with_codebook(frame, n_keep)
                                                              : frame.evict(kRawCodec, n_keep);
    }
    return plan;
  });
}

std::vector<HeadPlan> plan_streaming(const PlanFrame& frame, std::uint64_t budget) {
  std::vector<HeadPlan> plan = complete(frame, kRawCodec);
  const auto with_window = [&](std::int64_t window) {
    std::fill(plan.begin(), plan.end(), frame.stream(kRawCodec, window));
  };
  if (frame.policy.window > 0) {
    with_window(frame.policy.window);
    return plan;
  }
  // Windows that fill their pages; the smallest holds the observation window.
  constexpr std::int64_t kPage = kernels::kKvBlockTokens;
  std::int64_t fits = (frame.n_tokens() - kObservationWindow) / kPage;
  std::int64_t too_early = -1;
  with_window(frame.n_tokens());
  if (frame.cost(plan) <= budget) return plan;
  while (too_early + 1 < fits) {
    const std::int64_t page = std::midpoint(too_early, fits);
    with_window(frame.n_tokens() - page * kPage);
    (frame.cost(plan) <= budget ? fits : too_early) = page;
  }
  with_window(frame.n_tokens() - fits * kPage);
  return plan;
}

std::vector<HeadPlan> plan_simlayer(const PlanFrame& frame, std::uint64_t budget) {
  const kernels::KvCodec codec =
      frame.policy.profile == KvProfile::kSimLayerKv ? kRawCodec : kKivi4Codec;
  const std::vector<double>& mass = frame.report.lazy_mass;
  const HeadPlan streaming = frame.stream(codec, lazy_window(frame.policy));
  std::vector<HeadPlan> plan = complete(frame, codec);
  const auto make_lazy = [&](int layer) {
    const auto first = plan.begin() + static_cast<std::ptrdiff_t>(layer) * frame.model.n_kv_heads;
    std::fill(first, first + frame.model.n_kv_heads, streaming);
  };
  if (budget == kNoLimit) {
    const double threshold = frame.policy.lazy_threshold > 0 ? frame.policy.lazy_threshold : 0.9;
    for (int layer = 0; layer < frame.model.n_layers; ++layer) {
      if (mass[static_cast<std::size_t>(layer)] > threshold) make_lazy(layer);
    }
    return plan;
  }
  std::vector<int> laziest(static_cast<std::size_t>(frame.model.n_layers));
  std::iota(laziest.begin(), laziest.end(), 0);
  const auto rank = [&](int layer) {  // NaN is not lazy
    const double value = mass[static_cast<std::size_t>(layer)];
    return std::isnan(value) ? -1.0 : value;
  };
  std::stable_sort(laziest.begin(), laziest.end(), [&](int a, int b) { return rank(a) > rank(b); });
  for (const int layer : laziest) {
    if (frame.cost(plan) <= budget) break;
    make_lazy(layer);
  }
  return plan;
}

}  // namespace

std::vector<HeadPlan> plan_profile(const PlanFrame& frame, std::uint64_t budget) {
  switch (frame.policy.profile) {
    case KvProfile::kFull:
      return complete(frame, kRawCodec);
    case KvProfile::kSpindle:
      return plan_spindle(frame, budget);
    case KvProfile::kSpindleKv:
    case KvProfile::kSnapKv:
    case KvProfile::kPyramidKv:
    case KvProfile::kKeyDiff:
      return plan_evicting(frame, budget);
    case KvProfile::kSimLayerKv:
    case KvProfile::kSimLayerKvInt4:
      return plan_simlayer(frame, budget);
    case KvProfile::kStreaming:
      return plan_streaming(frame, budget);
    case KvProfile::kDefensive: {
      std::vector<HeadPlan> plan = complete(frame, kInt4Codec);
      std::vector<std::size_t> heads(plan.size());
      std::iota(heads.begin(), heads.end(), std::size_t{0});
      fill_global(frame, heads, budget, plan);
      return plan;
    }
    case KvProfile::kInt4:
      return complete(frame, kInt4Codec);
    case KvProfile::kKivi4:
      return complete(frame, kKivi4Codec);
    case KvProfile::kKivi2:
      return complete(frame, kKivi2Codec);
  }
  CHECK(false, "unknown profile");
  return {};
}

void fill_evict(const PlanFrame& frame, std::uint64_t budget, std::vector<HeadPlan>& plan) {
  std::vector<std::size_t> evicting;
  std::uint64_t others = 0;
  for (std::size_t i = 0; i < plan.size(); ++i) {
    if (plan[i].mode == KvMode::kEvict) {
      evicting.push_back(i);
    } else {
      others += frame.cost(i, plan[i]);
    }
  }
  if (evicting.empty()) return;
  const std::uint64_t left = budget > others ? budget - others : 0;
  if (is_global(frame.policy.profile)) return fill_global(frame, evicting, left, plan);
  plan = largest_share(frame, budget, [&](double share) {
    std::vector<HeadPlan> filled = plan;
    for (const std::size_t i : evicting) {
      filled[i].n_keep =
          std::clamp<std::int64_t>(kept_at(frame, share, frame.layer(i)), 0, frame.n_candidates());
    }
    return filled;
  });
}

}  // namespace spindle::kvstore
