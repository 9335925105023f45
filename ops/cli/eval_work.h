#pragma once
// Measures many probes over several connections at the same time.

#include <chrono>
#include <cstdint>
#include <vector>

#include "cluster/api/tcp_client.h"
#include "kernels/core/status.h"
#include "ops/cli/eval_journal.h"
#include "ops/cli/eval_runner.h"
#include "ops/cli/eval_summary.h"

namespace spindle::cli {

struct EvalTask {
  EvalItem item;
  Probe probe;
  std::vector<Cell> cells;
};

struct WorkOptions {
  api::TcpClientOptions client;
  std::chrono::milliseconds timeout{300'000};  // for the next frame of a request
  int concurrency = 1;
  bool sessions = true;
  std::int32_t max_scores = 256;
  int cancel_fd = -1;
};

// Cells of the task that `results` does not have.
std::vector<Cell> missing_cells(const EvalTask& task, const Results& results);

// Everything that the journal does not have yet, each result written to it; returns all results.
// Tasks begin in order. The first error ends all workers; CANCELLED after Ctrl-C.
Result<Results> run_tasks(const std::vector<EvalTask>& tasks, const WorkOptions& options,
                          EvalJournal& journal);

}  // namespace spindle::cli
