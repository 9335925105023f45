#pragma once
// `spindle plan`: how much KV a cluster has for a model, and how many requests run at once. Needs
// no cluster, no device and no weights.

#include "ops/cli/plan_input.h"
#include "ops/cli/plan_report.h"

namespace spindle::cli {

// Everything that a question asks for. RESOURCE_EXHAUSTED when the cluster cannot start.
Result<PlanAnswer> answer_plan(const PlanQuestion& question,
                               std::optional<std::int64_t> concurrency);
// What would let n requests run at once; 0: what would let the cluster start.
PlanRemedies find_remedies(const PlanQuestion& question, std::int64_t n);

// Returns the exit code: 1 when the cluster cannot start or --concurrency does not fit.
int run_plan(const PlanOptions& options);

}  // namespace spindle::cli
