#pragma once
// What a run of `spindle eval` has to measure: records and prose as probes.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "ops/cli/eval_config.h"
#include "ops/cli/eval_work.h"

namespace spindle::cli {

struct TaskPlan {
  std::vector<EvalTask> tasks;
  int n_moved = 0;     // probes with a position inside a token
  int n_too_long = 0;  // left out: longer than the server's context
};

inline constexpr std::int32_t kProseScored = 256;

// One task for each record and regime; prose records are scored at their ends, whatever the
// regimes.
Status add_records(const std::vector<EvalRecord>& records, const std::vector<Regime>& regimes,
                   const std::vector<Cell>& cells, const EvalModel& model,
                   std::int32_t max_model_len, TaskPlan& plan);

// For each prefix length as many disjoint windows of the text as there are, up to `max_windows`.
// INVALID_ARGUMENT when there is none for a length.
Status add_prose(const std::string& text, const std::vector<std::int32_t>& prefixes,
                 std::size_t max_windows, const std::vector<Cell>& cells, const EvalModel& model,
                 std::int32_t max_model_len, TaskPlan& plan);

}  // namespace spindle::cli
