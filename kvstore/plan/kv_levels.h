#pragma once
// Levels: the share of the uncompressed bytes that one stage's layers are planned for. A balancer
// gives a stage that is short of memory a stronger level than the others
// (cluster/coordinator/budget_balancer.h); the plan of a sequence is then composed of several.
//
// Thread-safety: plain values and pure functions.

#include <span>

#include "kvstore/plan/kv_plan.h"

namespace spindle::kvstore {

struct LayerRatio {
  int first_layer = 0;
  int n_layers = 0;
  double ratio = 0;  // as KvPolicy::ratio, but soft; 0: the policy's own size
};

// plan_boundary with a level for each range of layers; empty, or 0 everywhere: the policy's plan.
// The whole model is planned once for each distinct ratio, at a plan's cost each, so that each
// keeps one threshold over all layers and heads, and every range takes its heads from the plan of
// its ratio. The ranges cover the model in ascending order, else INTERNAL.
//
// - A ratio out of reach gives the smallest plan, never an error; one above a size that a request
//   asked for (no best_effort) gives that size. The policy's own size (0) can still be refused.
//   Where that grows for a short prompt, ratios below it grow in proportion.
// - `recent` is the sequence's, so the smallest of the plans. Where the shorter tail would make a
//   head larger, it drops tokens for that: a range takes at most what its heads cost in the plan of
//   its ratio (a head that has nothing left to drop, at most one list of positions more).
// - At a later boundary each range's new tokens stay by the share of its ratio; what ranges of
//   lighter levels keep complete is not taken from the stronger ones.
Result<SequencePlan> plan_boundary(const KvPolicy& policy, const KvModel& model,
                                   const ProfileTable* table, const BoundaryReport& report,
                                   std::span<const LayerRatio> levels);

}  // namespace spindle::kvstore
