#pragma once
// One cell of the capacity study: a cluster under a load that never lets its queue run dry.

#include <cstdint>
#include <functional>
#include <vector>

#include "cluster/coordinator/bench/capacity_cluster.h"
#include "cluster/coordinator/bench/capacity_load.h"

namespace spindle::coordinator::bench {

struct StageUse {
  int n_layers = 0;
  std::int64_t n_pages = 0;
  double busy_share = 0;      // of the window; the rest is the pipeline's bubble
  double used_share = 0;      // of the pool, pages held, mean over steps
  double reserved_share = 0;  // and promised beside them
};

// Figures of the window from when a fifth of the requests have ended until the last one is
// submitted; when that is before, until half of them have ended.
struct CapacityResult {
  std::string violation;    // of an invariant: the run is void
  bool waits = false;       // the queue was full all through the window
  double window_s = 0;      // virtual
  double makespan_s = 0;    // of all requests
  double concurrency = 0;   // mean running requests
  double output_per_s = 0;  // tokens
  double run_per_s = 0;     // tokens run, prompts included
  double batch_tokens = 0;  // of a step
  double step_us = 0;       // window by steps
  double mean_prompt = 0;
  double mean_output = 0;
  double decision_mean_us = 0;  // CPU time of next_step and on_result, by step
  double decision_p50_us = 0;
  double decision_p99_us = 0;
  double decision_share = 0;  // of the step
  std::uint64_t n_preemptions = 0;
  std::int64_t n_budget_plans = 0;
  std::vector<int>
      levels;  // [n_stages], steps of the ladder beyond the policy's own, when the window ends
  double cpu_s = 0;  // CPU time of the simulation
  std::uint64_t n_steps = 0;
  std::vector<StageUse> stages;
};

// `real_ns` is a clock for the decisions' cost.
CapacityResult run_capacity(const simulation::SimulationConfig& cluster, const LoadSettings& load,
                            std::function<std::int64_t()> real_ns);

}  // namespace spindle::coordinator::bench
