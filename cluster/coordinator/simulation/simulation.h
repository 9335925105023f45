#pragma once
// A whole cluster in one thread: rank 0's scheduler, driven as worker/engine/pipeline_engine drives
// it, simulated stages, and the links between them, on a virtual clock. From one seed a run is the
// same everywhere. What must hold is checked after everything that happens; the first thing that
// does not ends the run.
//
// Order: a link keeps its order, so that plans reach a stage, and a stage's results rank 0, in the
// order in which they were sent. Between stages nothing is promised.
//
// Thread-safety: none.

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "cluster/coordinator/kv_balance.h"
#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/simulation/event_queue.h"
#include "cluster/coordinator/simulation/fair_share.h"
#include "cluster/coordinator/simulation/fault.h"
#include "cluster/coordinator/simulation/latency_model.h"
#include "cluster/coordinator/simulation/request_book.h"
#include "cluster/coordinator/simulation/seeded_random.h"
#include "cluster/coordinator/simulation/simulated_stage.h"

namespace spindle::coordinator::simulation {

struct SimulationConfig {
  SchedulerConfig scheduler;
  kvstore::KvShape shape;
  std::vector<StageCapacity> stages;
  std::vector<LatencyModel> latency;  // [n_stages]
  LinkModel link;
  TokenModel tokens;
  std::uint64_t seed = 0;
  std::int32_t first_priority = 0;  // the lowest that requests have
  // Moves budgets between the stages as the daemon does.
  std::optional<KvBalance> balance;
  // A step that is not done by then fails the cluster.
  std::int64_t step_timeout_us = 10'000'000;
  FaultInjector faults;
  // Compare every page after every step; costs time on large caches.
  bool walks_pages = true;
  std::ostream* trace = nullptr;  // a line for everything that happens
  // A real clock in nanoseconds, to measure decisions with; no decision depends on it.
  std::function<std::int64_t()> real_ns;
};

// Sums since the start; differences of two moments say what happened between them.
struct StageMetrics {
  double busy_us = 0;
  std::uint64_t n_steps = 0;
  // Summed over its steps.
  double used_pages = 0;
  double reserved_pages = 0;
};

struct SimulationMetrics {
  std::int64_t now_us = 0;
  std::vector<StageMetrics> stages;
  std::uint64_t n_steps = 0;
  std::int64_t n_step_tokens = 0;  // run
  std::int64_t n_output_tokens = 0;
  std::int64_t n_budget_plans = 0;
  // Integrals over virtual time.
  double running_us = 0;
  double waiting_us = 0;
  // Real time of every step: its plan and all its results.
  std::vector<std::int64_t> decision_ns;
};

class Simulation {
 public:
  using OnEnd = std::function<void(engine::RequestHandle, const Life&)>;

  explicit Simulation(SimulationConfig config);

  EventQueue& clock() { return clock_; }
  // Called when a request ends, and may submit the next.
  void set_on_end(OnEnd on_end) { on_end_ = std::move(on_end); }

  // What happens now. Submits are refused with UNAVAILABLE when the cluster has failed.
  Result<engine::RequestHandle> submit(engine::EngineRequest request);
  void cancel(engine::RequestHandle handle);
  void finish_choice(engine::RequestHandle handle, std::int32_t choice);
  void start_draining();
  // Ends all requests with this status, as a drain's limit does.
  void end_all(const Status& status);
  // The stage does nothing any more; or it fails in its next step.
  void stop_stage(std::size_t stage);
  void fail_stage(std::size_t stage);

  // Until nothing is left to happen, sessions included; then the stages must be empty.
  void run();

  // Empty, or the first invariant that was broken.
  const std::string& violation() const { return violation_; }
  bool has_failed() const { return has_failed_; }
  const Scheduler& scheduler() const { return scheduler_; }
  const RequestBook& requests() const { return book_; }
  const SimulationMetrics& metrics() const { return metrics_; }
  const FaultInjector& faults() const { return config_.faults; }

 private:
  // A plan on its way, and what rank 0 had promised when it was made.
  struct SentPlan {
    control::StepPlan plan;
    std::vector<std::int64_t> committed;  // [n_stages]
  };
  using PlanPointer = std::shared_ptr<const SentPlan>;
  struct Stage {
    explicit Stage(const SimulatedStageConfig& stage_config) : stage(stage_config) {}
    SimulatedStage stage;
    std::deque<PlanPointer> inbox;
    std::vector<BudgetPlan> budgets;   // received, of epochs 1, 2, ...
    std::uint64_t budget_epoch = 0;    // of the last step
    std::uint64_t activations_of = 0;  // the last step whose activations are here
    bool is_busy = false;
    bool is_stopped = false;
    bool fails_next = false;
    std::int64_t plan_arrives_us = 0;  // the last one sent
    std::int64_t budget_arrives_us = 0;
    std::int64_t activations_arrive_us = 0;
    std::int64_t result_arrives_us = 0;
  };

  void violate(const std::string& what);
  void require(const Status& status) {
    if (!status.ok()) violate(status.message());
  }
  void say(const std::string& what);
  std::int64_t delay(double us);
  std::int64_t control_delay();

  void pump();
  void send(control::StepPlan plan);
  void check_plan(const control::StepPlan& plan);
  void receive_plan(std::size_t stage, PlanPointer plan);
  void try_start(std::size_t stage);
  void finish_step(std::size_t stage, const PlanPointer& plan,
                   std::shared_ptr<control::StepResult> result);
  void receive_result(const control::StepResult& result);
  void report_budget(std::size_t stage, const control::StepPlan& plan);
  void balance();
  void send_budget(const BudgetPlan& plan);
  Status check_budget(std::size_t stage, const control::StepPlan& plan);
  void take_events();
  void check_rank0();
  void check_stage(std::size_t stage, const SentPlan& sent);
  void check_nothing_left();
  void watch_deadline();
  void fail(const Status& status);
  void count_time();
  std::int64_t real_ns() const { return config_.real_ns ? config_.real_ns() : 0; }
  void count_decision(std::uint64_t step, std::int64_t ns);

  SimulationConfig config_;
  EventQueue clock_;
  SeededRandom random_;
  Scheduler scheduler_;
  std::deque<Stage> stages_;
  RequestBook book_;
  FairShare fair_share_;
  OnEnd on_end_;
  SimulationMetrics metrics_;
  std::string violation_;
  std::uint64_t last_step_ = 0;
  std::vector<BudgetReport> reports_;  // of an exchange that is not complete
  BudgetPlan last_budget_;
  int n_running_ = 0;  // since metrics_.now_us
  int n_waiting_ = 0;
  bool is_watching_ = false;
  bool may_fail_ = false;  // a stage was told to
  bool has_failed_ = false;
  bool pumps_ = false;
  bool pumps_again_ = false;
};

}  // namespace spindle::coordinator::simulation
