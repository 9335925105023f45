#include "cluster/coordinator/bench/capacity_run.h"

#include <algorithm>
#include <optional>

namespace spindle::coordinator::bench {
namespace {

using simulation::SimulationMetrics;

// How often the clients look at the queue.
constexpr std::int64_t kRefillUs = 1000;

// Real times of steps in microseconds.
void fill_decisions(const SimulationMetrics& from, const SimulationMetrics& to,
                    CapacityResult& out) {
  std::vector<double> us;
  for (std::uint64_t step = from.n_steps; step < to.n_steps; ++step) {
    us.push_back(static_cast<double>(to.decision_ns[step]) * 1e-3);
  }
  if (us.empty()) return;
  std::sort(us.begin(), us.end());
  double sum = 0;
  for (const double one : us) sum += one;
  out.decision_mean_us = sum / static_cast<double>(us.size());
  out.decision_p50_us = us[us.size() / 2];
  out.decision_p99_us = us[us.size() * 99 / 100];
}

void fill_window(const SimulationMetrics& from, const SimulationMetrics& to, CapacityResult& out) {
  const auto us = static_cast<double>(to.now_us - from.now_us);
  const auto n_steps = static_cast<double>(to.n_steps - from.n_steps);
  if (us <= 0 || n_steps <= 0) return;
  const auto n_run = static_cast<double>(to.n_step_tokens - from.n_step_tokens);
  out.window_s = us * 1e-6;
  out.concurrency = (to.running_us - from.running_us) / us;
  out.output_per_s = static_cast<double>(to.n_output_tokens - from.n_output_tokens) / us * 1e6;
  out.run_per_s = n_run / us * 1e6;
  out.batch_tokens = n_run / n_steps;
  out.step_us = us / n_steps;
  for (std::size_t s = 0; s < out.stages.size(); ++s) {
    const simulation::StageMetrics& a = from.stages[s];
    const simulation::StageMetrics& b = to.stages[s];
    StageUse& use = out.stages[s];
    use.busy_share = (b.busy_us - a.busy_us) / us;
    const double pages =
        static_cast<double>(b.n_steps - a.n_steps) * static_cast<double>(use.n_pages);
    if (pages <= 0) continue;
    use.used_share = (b.used_pages - a.used_pages) / pages;
    use.reserved_share = (b.reserved_pages - a.reserved_pages) / pages;
  }
  fill_decisions(from, to, out);
  out.decision_share = out.decision_mean_us / out.step_us;
}

void fill_levels(const simulation::SimulationConfig& cluster, const BudgetPlan& plan,
                 CapacityResult& out) {
  if (!cluster.balance) return;
  for (std::size_t s = 0; s < out.stages.size(); ++s) {
    const int own = static_cast<int>(cluster.balance->ladder.own);
    out.levels.push_back(plan.epoch == 0 ? 0 : plan.levels[s] - own);
  }
}

}  // namespace

CapacityResult run_capacity(const simulation::SimulationConfig& cluster, const LoadSettings& load,
                            std::function<std::int64_t()> real_ns) {
  CapacityResult result;
  for (const StageCapacity& stage : cluster.stages) {
    result.stages.push_back({.n_layers = stage.n_layers, .n_pages = stage.n_pages});
  }
  const std::int64_t begin_ns = real_ns();
  simulation::SimulationConfig config = cluster;
  config.real_ns = real_ns;
  simulation::Simulation simulation(std::move(config));

  std::optional<SimulationMetrics> from;
  std::optional<SimulationMetrics> to;
  int n_ended = 0;
  int n_submitted = 0;
  double n_output = 0;
  const std::vector<std::int32_t> lengths = prompt_lengths(load);
  // What cannot run waits, so that the cluster decides how much it takes.
  const auto refill = [&] {
    while (n_submitted < load.n_requests &&
           simulation.scheduler().counters().waiting < load.n_waiting && result.violation.empty()) {
      const std::int32_t n_prompt = lengths[static_cast<std::size_t>(n_submitted)];
      result.mean_prompt += static_cast<double>(n_prompt) / load.n_requests;
      const auto handle = simulation.submit(load_request(load, n_submitted++, n_prompt));
      if (!handle.ok()) result.violation = "refused: " + handle.status().to_string();
    }
  };
  simulation.set_on_end([&](engine::RequestHandle, const simulation::Life& life) {
    ++n_ended;
    n_output += life.summary.completion_tokens;
    if (!from && n_ended >= load.n_requests / 5) {
      from = simulation.metrics();
      result.waits = n_submitted < load.n_requests;
    }
    const bool is_over =
        result.waits ? n_submitted == load.n_requests : n_ended >= load.n_requests / 2;
    if (from && !to && is_over) {
      to = simulation.metrics();
      fill_levels(cluster, simulation.scheduler().budget_plan(), result);
    }
    if (n_ended == load.n_requests) {
      result.makespan_s = static_cast<double>(simulation.clock().now_us()) * 1e-6;
    }
  });
  std::function<void()> tick = [&] {
    refill();
    if (n_submitted < load.n_requests && result.violation.empty()) {
      simulation.clock().after(kRefillUs, tick);
    }
  };
  simulation.clock().at(1, tick);
  simulation.run();
  if (result.violation.empty()) result.violation = simulation.violation();
  result.mean_output = n_output / std::max(n_ended, 1);
  result.n_steps = simulation.metrics().n_steps;
  result.n_preemptions = simulation.scheduler().counters().preemptions;
  result.n_budget_plans = simulation.metrics().n_budget_plans;
  if (from && to) fill_window(*from, *to, result);
  result.cpu_s = static_cast<double>(real_ns() - begin_ns) * 1e-9;
  return result;
}

}  // namespace spindle::coordinator::bench
