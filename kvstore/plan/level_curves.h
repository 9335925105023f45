#pragma once
// What levels (kv_levels.h) take and lose, before any prompt is seen: the ladder of ratios that a
// policy can be planned for, and for every stage its bytes and its expected error on each step.
//
// Thread-safety: plain values and pure functions. Curves take some milliseconds of planning for
// each step: compute them once.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvstore/plan/kv_levels.h"

namespace spindle::kvstore {

struct LadderShape {
  double step = 0.97;  // from one ratio to the next, above 0 and below 1
  int n_lighter = 20;  // steps on either side of the policy's own size, at most
  int n_stronger = 47;
};

// Ratios of the uncompressed bytes from light to strong, in a geometric progression through the
// policy's own size, which is one of them (as it is before it grows for a short prompt). None asks
// for less than the policy's floor, unless its own does, and none for more than the uncompressed
// plan takes: the step that would go beyond ends there, and is left out when less than a fifth of a
// step remains.
struct LevelLadder {
  std::vector<double> ratios = {};
  std::size_t own = 0;

  std::size_t size() const { return ratios.size(); }
  // Of the policy's own size.
  double factor(std::size_t level) const { return ratios[level] / ratios[own]; }
};
// For prompts of n_tokens. INVALID_ARGUMENT for a shape out of range, no tokens, or a table of
// another model. The policy has passed validate_policy for as many tokens.
Result<LevelLadder> level_ladder(const KvPolicy& policy, const KvModel& model,
                                 const ProfileTable* table, std::int64_t n_tokens,
                                 const LadderShape& shape);

// The LayerRatio of a request at a level of the ladder, which may be another policy's: its own size
// times the level's factor; 0 at the ladder's own level. For profiles without a size (int4,
// simlayerkv by threshold) its own size is what it is expected to take.
Result<double> level_ratio(const LevelLadder& ladder, std::size_t level, const KvPolicy& policy,
                           const KvModel& model, const ProfileTable* table, std::int64_t n_tokens);

struct LayerSpan {  // a stage's layers
  int first_layer = 0;
  int n_layers = 0;
};
struct LevelPoint {
  std::uint64_t bytes = 0;  // of one sequence, without the waste of packing
  double error = 0;         // nats over the span's heads; without a table in units of its own
};
using LevelCurve = std::vector<LevelPoint>;  // [ladder.size()]

// For each span its curve, for a prompt of n_tokens in which every head scores its tokens alike.
// A stronger step takes no more bytes and has no less error than the one before: plans come close
// to that by themselves, and where they do not, bytes become the mean of the steps that are out of
// order and errors the most of those before. INTERNAL for a span outside
// the model; what plan_boundary refuses.
Result<std::vector<LevelCurve>> level_curves(const KvPolicy& policy, const KvModel& model,
                                             const ProfileTable* table, std::int64_t n_tokens,
                                             const LevelLadder& ladder,
                                             std::span<const LayerSpan> spans);

// The expected error of one head under `plan`, from its calibrated errors (null: those of a head
// that nobody calibrated).
double head_error(const HeadPlan& plan, std::int64_t n_tokens, const HeadErrors* errors);

}  // namespace spindle::kvstore
