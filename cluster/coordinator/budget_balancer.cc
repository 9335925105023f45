#include "cluster/coordinator/budget_balancer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>

namespace spindle::coordinator {
namespace {

// Fewer requests than this, smoothed, are none.
constexpr double kIdle = 0.5;
// Levels lighter than the policy's own need room for this many times the requests wanted, or for
// all that can ever run together: there is nothing to win but error that the policy accepts.
constexpr double kLighterRoom = 2.0;
// Demand may grow, but no more can run than fit with every stage at its strongest. Beyond them a
// lighter level needs room only for what projections may be wrong by.
constexpr double kProjectionMargin = 0.02;
// Of min_gain, what is enough where a stage would be full long before the others. Projections move
// by a few percent from one call to the next, and sizes may be that near to each other.
constexpr double kSmallGain = 0.5;
// A factor is the mean over so many prompts of typical length, and what it can be: of a prompt much
// shorter than that far more is kept than curves say.
constexpr double kFactorPrompts = 16;
constexpr double kLeastFactor = 0.25;
constexpr double kMostFactor = 16.0;
// A relief that lasts less than so many holds came too early; how far a hold may grow.
constexpr std::int64_t kSoon = 8;
constexpr std::int64_t kMostHolds = 16;
constexpr std::int64_t kMostHoldUs = 86'400'000'000;
// Prompts come and go: how many are in their prefill is averaged over a longer time than demand.
constexpr std::int64_t kPrefillSmoothing = 20;
// What a request can be and take; keeps figures far from overflow.
constexpr double kMostTokens = 1e9;
constexpr double kMostBytes = 1e18;
constexpr std::size_t kNamedStages = 8;  // in a reason

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f", value);
  return text;
}

double of_bytes(std::uint64_t bytes) { return static_cast<double>(bytes); }

// The same stage where it is the one that the next prompt does not fit.
StageLoad where_it_limits(const StageLoad& load) {
  StageLoad limiting = load;
  limiting.capacity = std::max(load.capacity - load.unfilled, 0.0);
  return limiting;
}

std::uint64_t capacity_of(const BalancerInput& input, std::size_t stage) {
  return std::min(input.reports[stage].capacity_bytes, input.ledger[stage].capacity_bytes);
}

// Monotone and finite, as level_curves makes them.
bool is_curve(const kvstore::LevelCurve& curve) {
  for (std::size_t l = 0; l < curve.size(); ++l) {
    if (curve[l].bytes == 0 || !std::isfinite(curve[l].error)) return false;
    if (l == 0) continue;
    if (curve[l].bytes > curve[l - 1].bytes || curve[l].error < curve[l - 1].error) return false;
  }
  return !curve.empty() && curve.size() <= kMaxBudgetLevels;
}

Status check_config(const BalancerConfig& config) {
  const std::size_t n_stages = config.curves.size();
  if (n_stages < 1 || n_stages > kMaxBudgetStages) {
    return invalid_argument("curves: 1 to " + std::to_string(kMaxBudgetStages) + " stages");
  }
  for (const kvstore::LevelCurve& curve : config.curves) {
    if (!is_curve(curve) || curve.size() != config.curves.front().size()) {
      return invalid_argument("curves: as many levels for every stage, at most " +
                              std::to_string(kMaxBudgetLevels) +
                              ", whose bytes never rise and whose error never falls");
    }
  }
  const auto n_levels = static_cast<int>(config.curves.front().size());
  const auto refuse = [](const char* field, const char* range) {
    return invalid_argument(std::string(field) + " must be " + range);
  };
  if (config.own_level < 0 || config.own_level >= n_levels) return refuse("own_level", "a level");
  if (config.typical_tokens < 1) return refuse("typical_tokens", "at least 1");
  if (config.token_bytes.size() != n_stages ||
      std::count(config.token_bytes.begin(), config.token_bytes.end(), 0u) > 0) {
    return refuse("token_bytes", "at least 1 for every stage");
  }
  if (config.max_num_seqs < 1) return refuse("max_num_seqs", "at least 1");
  if (config.warmup_us < 0) return refuse("warmup_us", "at least 0");
  if (config.cooldown_us < 0) return refuse("cooldown_us", "at least 0");
  if (config.relief_hold_us < 0 || config.relief_hold_us > kMostHoldUs) {
    return refuse("relief_hold_us", "0 to 1 day");
  }
  if (config.smoothing_us < 0) return refuse("smoothing_us", "at least 0");
  if (!(config.min_gain >= 0 && config.min_gain <= 1)) return refuse("min_gain", "in [0, 1]");
  if (!(config.relief_margin > 0 && config.relief_margin <= 10)) {
    return refuse("relief_margin", "in (0, 10]");
  }
  if (!(config.exhaustion_factor >= 1 && std::isfinite(config.exhaustion_factor))) {
    return refuse("exhaustion_factor", "at least 1");
  }
  if (!(config.unfilled_prompts >= 0 && config.unfilled_prompts <= 1)) {
    return refuse("unfilled_prompts", "in [0, 1]");
  }
  if (config.max_levels_moved < 1) return refuse("max_levels_moved", "at least 1");
  return ok_status();
}

}  // namespace

Result<BudgetBalancer> BudgetBalancer::make(BalancerConfig config) {
  if (Status status = check_config(config); !status.ok()) return status;
  return BudgetBalancer(std::move(config));
}

BudgetBalancer::BudgetBalancer(BalancerConfig config)
    : config_(std::move(config)),
      n_levels_(static_cast<int>(config_.curves.front().size())),
      levels_(config_.curves.size(), config_.own_level),
      measured_(config_.curves.size()),
      prices_(config_.curves.size()),
      planned_bytes_(config_.curves.size()),
      extra_(config_.curves.size()),
      headroom_(config_.curves.size()),
      prefill_(config_.curves.size()),
      reliefs_(config_.curves.size(), {.hold_us = config_.relief_hold_us}) {
  for (Measured& measured : measured_) measured.factor.resize(config_.curves.front().size());
}

Status BudgetBalancer::check(const BalancerInput& input) const {
  const std::size_t n_stages = levels_.size();
  if (input.reports.size() != n_stages || input.ledger.size() != n_stages) {
    return internal_error("budget reports of " + std::to_string(input.reports.size()) +
                          " stages, and a ledger of " + std::to_string(input.ledger.size()) +
                          ", for " + std::to_string(n_stages));
  }
  for (std::size_t s = 0; s < n_stages; ++s) {
    const BudgetReport& report = input.reports[s];
    if (report.stage != s || report.n_stages != n_stages) {
      return internal_error("budget report " + std::to_string(s) + " is of stage " +
                            std::to_string(report.stage) + " of " +
                            std::to_string(report.n_stages));
    }
    if (report.step > 0 && report.step >= input.next_step) {
      return internal_error("stage " + std::to_string(s) + " reports step " +
                            std::to_string(report.step) + " before it was made");
    }
    if (report.epoch > epoch_) {
      return internal_error("stage " + std::to_string(s) + " reports budget plan " +
                            std::to_string(report.epoch) + " after " + std::to_string(epoch_));
    }
  }
  const auto bad = [](double tokens) { return !(tokens >= 0 && tokens <= kMostTokens); };
  if (input.n_running < 0 || input.n_waiting < 0 || input.n_prefilling < 0 ||
      input.n_prefilling > input.n_running || bad(input.mean_tokens) || bad(input.peak_tokens)) {
    return internal_error("a demand for the budget balancer that cannot be");
  }
  return ok_status();
}

// A report counts for the level in effect when it and the one before were made under one plan.
void BudgetBalancer::measure(std::span<const BudgetReport> reports, bool warm) {
  for (std::size_t s = 0; s < reports.size(); ++s) {
    const BudgetReport& report = reports[s];
    Measured& measured = measured_[s];
    const bool onward =
        report.planned_bytes > measured.planned_bytes && report.kept_bytes >= measured.kept_bytes;
    if (warm && onward && report.epoch == epoch_ && measured.epoch == epoch_) {
      const double planned = of_bytes(report.planned_bytes - measured.planned_bytes);
      const double kept = of_bytes(report.kept_bytes - measured.kept_bytes);
      const auto level = static_cast<std::size_t>(levels_[s]);
      const double most = kFactorPrompts * of_bytes(config_.curves[s][level].bytes);
      Factor& factor = measured.factor[level];
      // A size that is new here is first taken to be like its neighbour: levels are near to each
      // other, and one prompt says little.
      if (const auto near = nearest_factor(s, levels_[s]); near && factor.planned_bytes <= 0) {
        factor = {*near, most / 2};
      }
      const double now = std::clamp(kept / planned, kLeastFactor, kMostFactor);
      factor.value += planned / (factor.planned_bytes + planned) * (now - factor.value);
      factor.planned_bytes = std::min(factor.planned_bytes + planned, most);
    }
    measured.planned_bytes = report.planned_bytes;
    measured.kept_bytes = report.kept_bytes;
    measured.epoch = report.epoch;
  }
}

// Of the nearest level that was measured, the stronger of two; none: no level was.
std::optional<double> BudgetBalancer::nearest_factor(std::size_t stage, int level) const {
  const auto& factors = measured_[stage].factor;
  for (int distance = 0; distance < n_levels_; ++distance) {
    for (const int near : {level + distance, level - distance}) {
      if (near < 0 || near >= n_levels_) continue;
      const Factor& found = factors[static_cast<std::size_t>(near)];
      if (found.planned_bytes > 0) return found.value;
    }
  }
  return std::nullopt;
}

void BudgetBalancer::smooth_demand(const BalancerInput& input) {
  const double demand = static_cast<double>(input.n_running) + input.n_waiting;
  const auto weight_of = [&](std::int64_t time_constant_us) {
    if (!smoothed_us_ || time_constant_us <= 0) return 1.0;
    const auto passed =
        static_cast<double>(std::max<std::int64_t>(input.now_us - *smoothed_us_, 0));
    return 1.0 - std::exp(-passed / static_cast<double>(time_constant_us));
  };
  const double weight = weight_of(config_.smoothing_us);
  const double prefill_weight = weight_of(kPrefillSmoothing * config_.smoothing_us);
  smoothed_us_ = input.now_us;
  n_prefilling_ += prefill_weight * (input.n_prefilling - n_prefilling_);
  for (std::size_t s = 0; s < prefill_.size(); ++s) {
    prefill_[s] += prefill_weight * (of_bytes(input.ledger[s].prefill_bytes) - prefill_[s]);
  }
  for (std::size_t s = 0; s < extra_.size() && input.n_running > 0; ++s) {
    extra_[s] += weight * (of_bytes(input.ledger[s].extra_bytes) - extra_[s]);
    headroom_[s] += weight * (of_bytes(input.ledger[s].headroom_bytes) - headroom_[s]);
  }
  demand_ += weight * (demand - demand_);
  if (input.mean_tokens <= 0) return;  // nobody says how long requests are
  const double length_weight = mean_tokens_ > 0 ? weight : 1.0;
  const double peak = std::max(input.peak_tokens, input.mean_tokens);
  mean_tokens_ += length_weight * (input.mean_tokens - mean_tokens_);
  peak_tokens_ += length_weight * (peak - peak_tokens_);
}

double BudgetBalancer::request_bytes(std::size_t stage, int level, double n_tokens) const {
  const kvstore::LevelPoint& point = config_.curves[stage][static_cast<std::size_t>(level)];
  return of_bytes(point.bytes) * n_tokens / static_cast<double>(config_.typical_tokens);
}

std::vector<StageLoad> BudgetBalancer::project(const BalancerInput& input) const {
  const double n_tokens =
      mean_tokens_ > 0 ? mean_tokens_ : static_cast<double>(config_.typical_tokens);
  std::vector<StageLoad> loads(levels_.size());
  for (std::size_t s = 0; s < loads.size(); ++s) {
    StageLoad& load = loads[s];
    for (int level = 0; level < n_levels_; ++level) {
      load.bytes.push_back(std::clamp(
          request_bytes(s, level, n_tokens) * nearest_factor(s, level).value_or(1.0) + extra_[s],
          1.0, kMostBytes));
      load.error.push_back(config_.curves[s][static_cast<std::size_t>(level)].error);
    }
    // A stronger level never takes more, whatever was measured.
    for (std::size_t l = load.bytes.size() - 1; l-- > 0;) {
      load.bytes[l] = std::max(load.bytes[l], load.bytes[l + 1]);
    }
    const double token_bytes = of_bytes(config_.token_bytes[s]);
    load.capacity = std::max(
        of_bytes(capacity_of(input, s)) - of_bytes(input.ledger[s].fixed_bytes) - headroom_[s],
        0.0);
    load.unfilled = config_.unfilled_prompts * token_bytes * mean_tokens_;
    load.peak = std::max(token_bytes * std::max(peak_tokens_, 1.0), prefill_[s]);
    load.n_at_peak = std::max(n_prefilling_, 1.0);
  }
  return loads;
}

double BudgetBalancer::fitting(const std::vector<StageLoad>& loads,
                               const std::vector<int>& levels) const {
  double fit = std::numeric_limits<double>::infinity();
  for (std::size_t s = 0; s < loads.size(); ++s) {
    fit = std::min(fit, requests_that_fit(where_it_limits(loads[s]), levels[s]));
  }
  return fit;
}

std::vector<BudgetBalancer::Target> BudgetBalancer::find_targets(
    const std::vector<StageLoad>& loads) {
  const std::vector<int> strongest(loads.size(), n_levels_ - 1);
  const double most =
      std::min(static_cast<double>(config_.max_num_seqs), fitting(loads, strongest));
  wanted_ = std::min(std::max(demand_, 1.0), most);
  fitting_ = fitting(loads, levels_);
  const bool idle = demand_ < kIdle;
  if (idle) wanted_ = 0;
  const double ever = most * (1.0 + std::min(config_.relief_margin, kProjectionMargin));
  const double relief_room = std::min(wanted_ * (1.0 + config_.relief_margin), ever);
  const double lighter_room = std::min(wanted_ * kLighterRoom, ever);
  std::vector<Target> targets(loads.size(), {config_.own_level, config_.own_level});
  for (std::size_t s = 0; s < loads.size(); ++s) {
    const StageLoad limiting = where_it_limits(loads[s]);
    const LevelChoice choice = choose_level(limiting, config_.own_level, wanted_);
    prices_[s] = choice.price;
    if (idle) continue;
    Target& target = targets[s];
    target.needed = choice.level;
    target.relaxed = choose_level(loads[s], config_.own_level, relief_room).level;
    if (config_.lighter_levels && target.needed == config_.own_level) {
      target.needed = std::min(target.needed, choose_level(limiting, 0, wanted_).level);
    }
    if (config_.lighter_levels && target.relaxed == config_.own_level) {
      target.relaxed = std::min(target.relaxed, choose_level(loads[s], 0, lighter_room).level);
    }
    target.relaxed = std::max(target.relaxed, target.needed);
  }
  return targets;
}

// The other side of requests_that_fit().
void BudgetBalancer::note_planned(const BalancerInput& input, const std::vector<StageLoad>& loads) {
  for (std::size_t s = 0; s < loads.size(); ++s) {
    planned_bytes_[s] =
        of_bytes(input.ledger[s].fixed_bytes) + bytes_of_requests(loads[s], levels_[s], wanted_);
  }
}

// Time to exhaustion is free bytes over growth, which is the rate of admission, the same for all
// stages, times a request's bytes: stages compare by the requests that they have room for.
bool BudgetBalancer::exhausted_first(const BalancerInput& input,
                                     const std::vector<StageLoad>& loads,
                                     const std::vector<Target>& targets) const {
  double pressed = std::numeric_limits<double>::infinity();
  double others = pressed;
  for (std::size_t s = 0; s < loads.size(); ++s) {
    const BudgetReport& report = input.reports[s];
    const std::uint64_t taken =
        std::max(input.ledger[s].committed_bytes, report.used_bytes + report.reserved_bytes);
    const double room = std::max(0.0, of_bytes(capacity_of(input, s)) - of_bytes(taken)) /
                        loads[s].bytes[static_cast<std::size_t>(levels_[s])];
    double& least = levels_[s] < targets[s].needed ? pressed : others;
    least = std::min(least, room);
  }
  return std::isfinite(others) && pressed * config_.exhaustion_factor < others;
}

std::optional<BudgetDecision> BudgetBalancer::press(const BalancerInput& input,
                                                    const std::vector<StageLoad>& loads,
                                                    const std::vector<Target>& targets) {
  std::vector<int> target = levels_;
  for (std::size_t s = 0; s < target.size(); ++s) {
    target[s] = std::max(target[s], targets[s].needed);
  }
  if (target == levels_ || wanted_ <= 0) return std::nullopt;
  const double served = std::min(wanted_, fitting_);
  const double then = std::min(wanted_, fitting(loads, target));
  const bool gains = then > served * (1.0 + config_.min_gain);
  const bool first = then > served * (1.0 + config_.min_gain * kSmallGain) &&
                     exhausted_first(input, loads, targets);
  if (!gains && !first) return std::nullopt;
  std::string why =
      number(wanted_) + " requests should run together and " + number(fitting_) + " fit";
  if (!gains) why += ", where others have room";
  return move_to(input, target, BudgetReason::kPressure, std::move(why));
}

std::optional<BudgetDecision> BudgetBalancer::relieve(const BalancerInput& input,
                                                      const std::vector<StageLoad>& loads,
                                                      const std::vector<Target>& targets) {
  std::vector<int> target = levels_;
  for (std::size_t s = 0; s < target.size(); ++s) {
    const Relief& relief = reliefs_[s];
    const std::int64_t hold_us = wanted_ > 0 ? relief.hold_us : config_.relief_hold_us;
    if (!relief.since_us || input.now_us - *relief.since_us < hold_us) continue;
    const int relaxed = targets[s].relaxed;
    const double now = loads[s].error[static_cast<std::size_t>(levels_[s])];
    const double then = loads[s].error[static_cast<std::size_t>(relaxed)];
    if (relaxed == config_.own_level || then < now) target[s] = relaxed;
  }
  if (target == levels_) return std::nullopt;
  std::string why = "no requests";
  if (wanted_ > 0) {
    why = number(wanted_) + " requests should run together and " + number(fitting(loads, target)) +
          " fit with less compression";
  }
  return move_to(input, target, BudgetReason::kRelief, std::move(why));
}

void BudgetBalancer::note_lighter(const BalancerInput& input, const std::vector<Target>& targets) {
  for (std::size_t s = 0; s < levels_.size(); ++s) {
    // Without requests a lighter level than the policy's own goes back too.
    const bool would_do =
        targets[s].relaxed < levels_[s] || (wanted_ <= 0 && levels_[s] != config_.own_level);
    std::optional<std::int64_t>& since_us = reliefs_[s].since_us;
    if (!would_do) {
      since_us.reset();
    } else if (!since_us) {
      since_us = input.now_us;
    }
  }
}

void BudgetBalancer::note_move(std::size_t stage, bool stronger, std::int64_t now_us) {
  Relief& relief = reliefs_[stage];
  if (!stronger) {
    if (wanted_ > 0) relief.relieved_us = now_us;
  } else if (relief.relieved_us) {
    const bool soon = now_us - *relief.relieved_us < kSoon * relief.hold_us;
    relief.hold_us = std::clamp(soon ? 2 * relief.hold_us : relief.hold_us / 2,
                                config_.relief_hold_us, kMostHolds * config_.relief_hold_us);
    relief.relieved_us.reset();
  }
}

BudgetDecision BudgetBalancer::move_to(const BalancerInput& input, const std::vector<int>& target,
                                       BudgetReason reason, std::string why) {
  BudgetDecision decision;
  decision.reason = why;
  decision.why = std::move(why);
  std::size_t n_moved = 0;
  for (std::size_t s = 0; s < target.size(); ++s) {
    const int before = levels_[s];
    levels_[s] +=
        std::clamp(target[s] - before, -config_.max_levels_moved, config_.max_levels_moved);
    if (levels_[s] == before) continue;
    note_move(s, levels_[s] > before, input.now_us);
    if (++n_moved > kNamedStages) continue;
    decision.reason += (n_moved == 1 ? ": stage " : ", stage ") + std::to_string(s) +
                       " from level " + std::to_string(before) + " to " +
                       std::to_string(levels_[s]);
  }
  if (n_moved > kNamedStages) {
    decision.reason += " and " + std::to_string(n_moved - kNamedStages) + " more";
  }
  moved_us_ = input.now_us;
  decision.plan.epoch = ++epoch_;
  decision.plan.effective_step = input.next_step + config_.steps_ahead;
  decision.plan.n_stages = static_cast<std::uint32_t>(levels_.size());
  decision.plan.reason = reason;
  for (std::size_t s = 0; s < levels_.size(); ++s) {
    decision.plan.levels[s] = static_cast<std::uint8_t>(levels_[s]);
  }
  return decision;
}

Result<std::optional<BudgetDecision>> BudgetBalancer::decide(const BalancerInput& input) {
  if (Status status = check(input); !status.ok()) return status;
  std::optional<BudgetDecision> none;
  if (!first_us_) {
    first_us_ = input.now_us;
    first_step_ = input.next_step;
  }
  const bool warm =
      input.now_us - *first_us_ >= config_.warmup_us &&
      input.next_step - std::min(first_step_, input.next_step) >= config_.warmup_steps;
  measure(input.reports, warm);
  if (!warm) return none;
  smooth_demand(input);
  const std::vector<StageLoad> loads = project(input);
  const std::vector<Target> targets = find_targets(loads);
  note_planned(input, loads);
  note_lighter(input, targets);
  if (moved_us_ && input.now_us - *moved_us_ < config_.cooldown_us) return none;
  for (const BudgetReport& report : input.reports) {
    if (report.epoch != epoch_) return none;
  }
  if (auto decision = press(input, loads, targets)) return decision;
  return relieve(input, loads, targets);
}

}  // namespace spindle::coordinator
