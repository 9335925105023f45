#pragma once
// Moves KV budget between pipeline stages while the cluster runs. A request must fit on every
// stage, so the stage that is shortest of memory limits all of them: it compresses harder, the
// others stay as they are. Pure logic, driven by calls and a clock that the caller reads.
//
// At each call, from the stages' reports:
//
// 1. The number of requests that should run together: what is running and waiting (smoothed), at
//    most max_num_seqs, at most what fits with every stage at its strongest level. Every stage
//    keeps room for the prompts that are not compressed yet, as many as there were of late, but at
//    least for the longest; and, for the number it can run at most, half of an average one beside,
//    which is what remains where the next one does not fit.
// 2. For every stage the level of least error whose projection fits that many (level_choice.h).
//    Projections are the planned curves for prompts as long as those at hand, corrected by what
//    stages really kept of what the curves said, level by level, and what requests hold beside
//    them. All stages that memory binds then have about the same time to exhaustion: each was given
//    the bytes that as many requests need.
// 3. Whether it is worth a change. Stronger: when the requests that fit rise by min_gain, or by
//    half as much where the stage would be full exhaustion_factor times sooner than the stages that
//    are well. Lighter: when relief_margin more requests than wanted would still fit, or 2 % more
//    than can ever run together, for relief_hold_us without a break, and the stage's error falls at
//    all or to that of the policy's own level. So a level that was left for want of room is not
//    taken up again under the same load, and what the tightest stage leaves to others does not stay
//    unused. A stage that has to go back soon after a relief waits twice as long for the next one,
//    up to 16 times.
//
// Nothing happens in warm-up, nor within cooldown_us of the last change, nor before all stages
// report that change. Without requests every stage goes back to the policy's own level.
//
// Thread-safety: none; the engine's thread owns it.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cluster/coordinator/budget_messages.h"
#include "cluster/coordinator/level_choice.h"
#include "kernels/core/status.h"
#include "kvstore/plan/level_curves.h"

namespace spindle::coordinator {

struct BalancerConfig {
  std::vector<kvstore::LevelCurve> curves;  // [n_stages], of one ladder, for typical_tokens
  int own_level = 0;                        // the policy's own size on that ladder
  std::int64_t typical_tokens = 0;
  std::vector<std::uint64_t> token_bytes;  // [n_stages], of one token uncompressed
  int max_num_seqs = 64;
  std::uint64_t steps_ahead = 1;  // a plan takes effect this many steps after the next one
  bool lighter_levels = false;    // levels lighter than the policy's own, when there is memory
  std::int64_t warmup_us = 10'000'000;  // both must have passed
  std::uint64_t warmup_steps = 32;
  std::int64_t cooldown_us = 5'000'000;
  std::int64_t relief_hold_us = 15'000'000;
  std::int64_t smoothing_us = 3'000'000;  // time constant of the demand
  double min_gain = 0.05;
  double relief_margin = 0.25;
  double exhaustion_factor = 2.0;
  // A prompt is admitted when all of it fits: of a full stage so much of one is free on average.
  double unfilled_prompts = 0.5;
  int max_levels_moved = 2;  // of each stage, in one plan
};

// Of one stage, as rank 0 keeps its book.
struct LedgerUse {
  std::uint64_t committed_bytes = 0;
  std::uint64_t capacity_bytes = 0;
  // What levels do not reach of the committed: requests that are not compressed, kept sessions.
  std::uint64_t fixed_bytes = 0;
  // Of a running request that is compressed, on average: what it has beyond its compressed prompt.
  // Output is encoded and never dropped, so levels hardly reach it.
  std::uint64_t extra_bytes = 0;
  // Of the running requests that are not compressed yet.
  std::uint64_t prefill_bytes = 0;
  // Kept free for the growth of those that run when another is admitted.
  std::uint64_t headroom_bytes = 0;
};

struct BalancerInput {
  std::int64_t now_us = 0;
  std::uint64_t next_step = 0;            // the number of the next step plan to be made
  std::span<const BudgetReport> reports;  // [n_stages]
  std::span<const LedgerUse> ledger;      // [n_stages]
  int n_running = 0;     // of the requests that levels reach, as is all that follows
  int n_prefilling = 0;  // of the running: not compressed yet
  int n_waiting = 0;
  double mean_tokens = 0;  // of the prompts of the running and waiting; 0 when there are none
  double peak_tokens = 0;  // that the longest of them takes uncompressed; at least mean_tokens
};

struct BudgetDecision {
  BudgetPlan plan;
  std::string why;     // a short sentence
  std::string reason;  // it, and what moved from where to where
};

class BudgetBalancer {
 public:
  // INVALID_ARGUMENT naming the field at fault.
  static Result<BudgetBalancer> make(BalancerConfig config);

  // A plan to broadcast, or nothing. Its levels are this object's from then on, and the next plan
  // waits until every report has its epoch. INTERNAL for reports that are not those of all stages
  // in order, or of a step or plan that was never made; nothing has changed then.
  Result<std::optional<BudgetDecision>> decide(const BalancerInput& input);

  std::uint64_t epoch() const { return epoch_; }
  // That a plan can name.
  int lightest_level() const { return config_.lighter_levels ? 0 : config_.own_level; }
  const std::vector<int>& levels() const { return levels_; }  // [n_stages]
  // Of the last decide(), for metrics: error for a byte by stage, 0 where memory does not bind; the
  // requests that should run together, and how many fit.
  const std::vector<double>& prices() const { return prices_; }
  double wanted_requests() const { return wanted_; }
  double fitting_requests() const { return fitting_; }
  // What the curves say of a compressed prompt of n_tokens; in proportion, though short prompts
  // keep a larger share.
  double request_bytes(std::size_t stage, int level, double n_tokens) const;
  // [n_stages]: KV that those wanted take at the present levels, some of them in their prefill,
  // beside what levels do not reach; at least for one request. 0 before the first decide().
  const std::vector<double>& planned_bytes() const { return planned_bytes_; }

 private:
  // Real bytes over planned ones, of so many planned ones, at most those of some prompts.
  struct Factor {
    double value = 1.0;
    double planned_bytes = 0;
  };
  // By level. Levels differ in it, and one that was measured must not be projected from another:
  // the two would take turns.
  struct Measured {
    std::vector<Factor> factor;       // [n_levels]
    std::uint64_t planned_bytes = 0;  // totals of the last report
    std::uint64_t kept_bytes = 0;
    std::uint64_t epoch = 0;
  };
  struct Relief {
    std::optional<std::int64_t> since_us = {};     // a lighter level would do; none: it would not
    std::optional<std::int64_t> relieved_us = {};  // when the stage last became lighter
    std::int64_t hold_us = 0;
  };
  struct Target {
    int needed = 0;   // no lighter level serves what is wanted
    int relaxed = 0;  // no lighter level serves it with a margin; at least `needed`
  };

  explicit BudgetBalancer(BalancerConfig config);

  Status check(const BalancerInput& input) const;
  void measure(std::span<const BudgetReport> reports, bool warm);
  std::optional<double> nearest_factor(std::size_t stage, int level) const;
  void smooth_demand(const BalancerInput& input);
  std::vector<StageLoad> project(const BalancerInput& input) const;
  std::vector<Target> find_targets(const std::vector<StageLoad>& loads);
  void note_planned(const BalancerInput& input, const std::vector<StageLoad>& loads);
  double fitting(const std::vector<StageLoad>& loads, const std::vector<int>& levels) const;
  bool exhausted_first(const BalancerInput& input, const std::vector<StageLoad>& loads,
                       const std::vector<Target>& targets) const;
  std::optional<BudgetDecision> press(const BalancerInput& input,
                                      const std::vector<StageLoad>& loads,
                                      const std::vector<Target>& targets);
  std::optional<BudgetDecision> relieve(const BalancerInput& input,
                                        const std::vector<StageLoad>& loads,
                                        const std::vector<Target>& targets);
  void note_lighter(const BalancerInput& input, const std::vector<Target>& targets);
  void note_move(std::size_t stage, bool stronger, std::int64_t now_us);
  BudgetDecision move_to(const BalancerInput& input, const std::vector<int>& target,
                         BudgetReason reason, std::string why);

  BalancerConfig config_;
  int n_levels_ = 0;
  std::vector<int> levels_;            // [n_stages]
  std::vector<Measured> measured_;     // [n_stages]
  std::vector<double> prices_;         // [n_stages]
  std::vector<double> planned_bytes_;  // [n_stages]
  std::vector<double> extra_;          // [n_stages], LedgerUse::extra_bytes smoothed
  std::vector<double> headroom_;       // [n_stages], LedgerUse::headroom_bytes smoothed
  std::vector<double> prefill_;        // [n_stages], LedgerUse::prefill_bytes smoothed
  double n_prefilling_ = 0;
  std::vector<Relief> reliefs_;  // [n_stages]
  std::uint64_t epoch_ = 0;
  std::optional<std::int64_t> first_us_;
  std::uint64_t first_step_ = 0;
  std::optional<std::int64_t> smoothed_us_;
  std::optional<std::int64_t> moved_us_;
  double demand_ = 0;
  double mean_tokens_ = 0;
  double peak_tokens_ = 0;
  double wanted_ = 0;
  double fitting_ = 0;
};

}  // namespace spindle::coordinator
