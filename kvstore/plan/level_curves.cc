#include "kvstore/plan/level_curves.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kvstore/plan/expected_use.h"
#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;

constexpr double kWorstError = 1e9;    // for a calibrated figure that is not finite
constexpr double kLeastOfAStep = 0.2;  // the last one, of the others, in logarithms

// In place of calibration: what Lloyd-Max with 1 to 4 bits (J. Max, Quantizing for minimum
// distortion, 1960, table I) and a uniform quantizer with 4 lose of a unit Gaussian's variance, a
// codebook of cosine 0.98 / 0.95 of a unit vector, and a window of everything. The same for all
// heads: such curves tell levels apart, not heads.
constexpr HeadErrors kUncalibrated{.k_bits = {0.3634, 0.1175, 0.03454, 0.009497},
                                   .v_bits = {0.3634, 0.1175, 0.03454, 0.009497},
                                   .int4 = 2 * 0.01154,
                                   .codebook = 0.0396 + 0.0975,
                                   .window64 = 1.0,
                                   .window256 = 0.6};

double usable(double error) {
  if (!std::isfinite(error)) return kWorstError;
  return std::clamp(error, 0.0, kWorstError);
}

// Formats that calibration does not measure count as the one that has as many bits; those that are
// measured for both sides together, as half of it each.
double side_error(KvFormat format, const double (&by_bits)[4], const HeadErrors& errors) {
  switch (format) {
    case KvFormat::kRaw:
    case KvFormat::kToken:
      return 0;
    case KvFormat::kInt4:
    case KvFormat::kKivi4:
      return usable(errors.int4) / 2;
    case KvFormat::kKivi2:
      return usable(by_bits[1]);
    case KvFormat::kCodebook:
      return usable(errors.codebook) / 2;
    case KvFormat::kLloyd1:
    case KvFormat::kLloyd2:
    case KvFormat::kLloyd3:
    case KvFormat::kLloyd4:
      return usable(by_bits[kernels::lloyd_bits(format) - 1]);
  }
  return 0;
}

// Of keeping n_kept of n_tokens: the calibrated errors of windows of 64 and 256 tokens and the
// nothing that all tokens lose, joined by straight lines over the logarithm of what is kept; below
// 64 tokens the error grows with every halving by as much as it was.
double dropped_error(std::int64_t n_kept, std::int64_t n_tokens, const HeadErrors& errors) {
  if (n_kept >= n_tokens) return 0;
  const double at64 = usable(errors.window64);
  const double at256 = std::min(at64, usable(errors.window256));
  const double kept = std::log2(static_cast<double>(std::max<std::int64_t>(n_kept, 1)));
  const double all = std::log2(static_cast<double>(n_tokens));
  const auto between = [kept](double x0, double y0, double x1, double y1) {
    return x1 <= x0 ? y0 : y0 + (y1 - y0) * (kept - x0) / (x1 - x0);
  };
  if (kept <= 6.0) return at64 * (1.0 + 6.0 - kept);
  if (kept <= 8.0 && all > 8.0) return between(6.0, at64, 8.0, at256);
  if (all <= 8.0) return between(6.0, at64, all, 0.0);
  return between(8.0, at256, all, 0.0);
}

double ratio_of(std::uint64_t bytes, const KvModel& model, std::int64_t n_tokens) {
  return static_cast<double>(bytes) / static_cast<double>(full_bytes(model, n_tokens));
}

std::uint64_t bytes_of(const SequencePlan& plan, const KvModel& model, const ProfileTable* table,
                       std::int64_t n_tokens) {
  return plan_bytes(plan, model, n_tokens, tail_length(plan.recent, n_tokens), table);
}

// The policy's own size, without the growth of a soft one.
Result<double> own_ratio(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                         std::int64_t n_tokens) {
  const PlanSize size = plan_size(policy, model, table, n_tokens);
  if (size.limited) return size.ratio;
  const auto plan = plan_boundary(policy, model, table, even_report(policy, model, n_tokens));
  if (!plan.ok()) return plan.status();
  return ratio_of(bytes_of(*plan, model, table, n_tokens), model, n_tokens);
}

// The ratio whose level has the policy's least size.
double least_ratio(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                   std::int64_t n_tokens, double own) {
  const auto floor = static_cast<double>(floor_bytes(policy, model, table, n_tokens, -1));
  // Sizes up to the own one are in proportion to the ratio.
  const auto own_bytes = static_cast<double>(level_size(policy, model, table, n_tokens, own).bytes);
  return own * std::min(1.0, floor / own_bytes);
}

// Steps from `from` towards `limit`, the nearest first.
std::vector<double> steps_towards(double from, double limit, double factor, int n) {
  std::vector<double> steps;
  double last = from;
  for (int i = 0; i < n; ++i) {
    const double next = last * factor;
    const bool beyond = factor < 1 ? next <= limit : next >= limit;
    if (!beyond) {
      steps.push_back(next);
      last = next;
      continue;
    }
    // In units of a step, from the last one on.
    const double left = std::log(limit / last) / std::log(factor);
    if (left >= kLeastOfAStep) steps.push_back(limit);
    break;
  }
  return steps;
}

// Bytes that rise from a level to a stronger one take the mean of all levels that are out of order
// with each other (isotonic regression by pooling adjacent violators): a plan is for all layers
// together, and a stronger one may give some of them more.
void make_monotone(LevelCurve& curve) {
  struct Pool {
    double sum = 0;
    std::size_t n = 0;
    double mean() const { return sum / static_cast<double>(n); }
  };
  std::vector<Pool> pools;
  for (const LevelPoint& point : curve) {
    pools.push_back({static_cast<double>(point.bytes), 1});
    while (pools.size() > 1 && pools.back().mean() > pools[pools.size() - 2].mean()) {
      const Pool last = pools.back();
      pools.pop_back();
      pools.back().sum += last.sum;
      pools.back().n += last.n;
    }
  }
  std::size_t level = 0;
  for (const Pool& pool : pools) {
    for (std::size_t i = 0; i < pool.n; ++i) {
      curve[level++].bytes = static_cast<std::uint64_t>(pool.mean());
    }
  }
}

}  // namespace

double head_error(const HeadPlan& plan, std::int64_t n_tokens, const HeadErrors* errors) {
  const HeadErrors& used = errors != nullptr ? *errors : kUncalibrated;
  const double codec =
      side_error(plan.codec.k, used.k_bits, used) + side_error(plan.codec.v, used.v_bits, used);
  switch (plan.mode) {
    case KvMode::kFull:
      return codec;
    case KvMode::kStream:
      return codec + dropped_error(plan.window, n_tokens, used);
    case KvMode::kEvict:
      // The newest tokens are one of the sets that a selector could have kept, and it takes those
      // that score higher: a window of as many tokens bounds what it loses, falls with n_keep as it
      // does, and is calibrated head by head.
      return codec + dropped_error(plan.n_keep + kObservationWindow, n_tokens, used);
  }
  return codec;
}

Result<LevelLadder> level_ladder(const KvPolicy& policy, const KvModel& model,
                                 const ProfileTable* table, std::int64_t n_tokens,
                                 const LadderShape& shape) {
  if (!(shape.step > 0 && shape.step < 1) || shape.n_lighter < 0 || shape.n_stronger < 0) {
    return invalid_argument("a ladder of levels needs a step in (0, 1) and counts from 0 on");
  }
  if (table != nullptr && table->heads.size() != static_cast<std::size_t>(model.n_tables())) {
    return invalid_argument("a ladder of levels with the profile table of another model");
  }
  if (n_tokens < 1) return invalid_argument("a ladder of levels needs a prompt of one token");
  const auto own = own_ratio(policy, model, table, n_tokens);
  if (!own.ok()) return own.status();
  const double most =
      ratio_of(bytes_of(uncompressed_plan(policy, model), model, table, n_tokens), model, n_tokens);
  const double middle = std::min(*own, most);
  const double least = least_ratio(policy, model, table, n_tokens, middle);
  // A size that a request asked for is the most that any level gives.
  const PlanSize size = plan_size(policy, model, table, n_tokens);
  const int n_lighter = size.limited && !size.soft ? 0 : shape.n_lighter;
  std::vector<double> lighter = steps_towards(middle, most, 1 / shape.step, n_lighter);
  const std::vector<double> stronger = steps_towards(middle, least, shape.step, shape.n_stronger);
  LevelLadder ladder;
  ladder.own = lighter.size();
  ladder.ratios.assign(lighter.rbegin(), lighter.rend());
  ladder.ratios.push_back(middle);
  ladder.ratios.insert(ladder.ratios.end(), stronger.begin(), stronger.end());
  return ladder;
}

Result<double> level_ratio(const LevelLadder& ladder, std::size_t level, const KvPolicy& policy,
                           const KvModel& model, const ProfileTable* table, std::int64_t n_tokens) {
  if (level >= ladder.size() || ladder.own >= ladder.size()) {
    return internal_error("a level that is not on its ladder");
  }
  if (level == ladder.own) return 0.0;
  const auto own = own_ratio(policy, model, table, n_tokens);
  if (!own.ok()) return own.status();
  return *own * ladder.factor(level);
}

Result<std::vector<LevelCurve>> level_curves(const KvPolicy& policy, const KvModel& model,
                                             const ProfileTable* table, std::int64_t n_tokens,
                                             const LevelLadder& ladder,
                                             std::span<const LayerSpan> spans) {
  for (const LayerSpan& span : spans) {
    if (span.first_layer < 0 || span.n_layers < 1 ||
        span.n_layers > model.n_layers - span.first_layer) {
      return internal_error("a curve of layers that the model does not have");
    }
  }
  const BoundaryReport report = even_report(policy, model, n_tokens);
  std::vector<LevelCurve> curves(spans.size());
  for (std::size_t level = 0; level < ladder.size(); ++level) {
    const LayerRatio all{.n_layers = model.n_layers,
                         .ratio = level == ladder.own ? 0.0 : ladder.ratios[level]};
    const auto plan = plan_boundary(policy, model, table, report, std::span(&all, 1));
    if (!plan.ok()) return plan.status();
    const std::int64_t tail = tail_length(plan->recent, n_tokens);
    for (std::size_t s = 0; s < spans.size(); ++s) {
      LevelPoint point;
      const int first = spans[s].first_layer * model.n_kv_heads;
      for (int i = first; i < first + spans[s].n_layers * model.n_kv_heads; ++i) {
        const auto head = static_cast<std::size_t>(i);
        const HeadErrors* errors = table == nullptr ? nullptr : &table->heads[head];
        point.bytes += head_bytes(plan->heads[head], model, plan->sinks, n_tokens, tail, errors);
        point.error += head_error(plan->heads[head], n_tokens, errors);
      }
      if (level > 0) point.error = std::max(point.error, curves[s].back().error);
      curves[s].push_back(point);
    }
  }
  for (LevelCurve& curve : curves) make_monotone(curve);
  return curves;
}

}  // namespace spindle::kvstore
