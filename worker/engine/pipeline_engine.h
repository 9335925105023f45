#pragma once
// The engine on rank 0: the scheduler driven by real time, plans out to the stages, results back,
// events to the sinks.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cluster/comm/host_group.h"
#include "cluster/coordinator/scheduler.h"
#include "cluster/engine/engine.h"
#include "proto/control.pb.h"
#include "worker/trace/step_recorder.h"

namespace spindle::worker {

struct PipelineEngineOptions {
  // A step that takes longer means a stage is stuck: on_failure is called.
  std::chrono::milliseconds step_timeout{120000};
  // What the scheduler decides, while it is on. Not owned; null: nothing.
  StepRecorder* recorder = nullptr;
};

// A thread of its own waits for results and for the callers, schedules, and calls the sinks.
//
// Owns the scheduler; does not own the host group, which must outlive it.
// Thread-safety: as engine::Engine; start(), drain(), stop() from one thread.
// Invariant: every accepted request's sink gets on_end exactly once, also when the engine fails.
class PipelineEngine final : public engine::Engine {
 public:
  // Called once, on the engine's thread, when the cluster cannot go on. All requests have ended with
  // INTERNAL by then.
  using OnFailure = std::function<void(const Status&)>;

  PipelineEngine(comm::HostGroup& host, coordinator::SchedulerConfig config,
                 coordinator::KvLedger ledger, const std::vector<control::StageInfo>& stages,
                 PipelineEngineOptions options, OnFailure on_failure);
  ~PipelineEngine() override;

  void start();
  // Before start().
  void set_balancer(coordinator::BudgetBalancer balancer, kvstore::LevelLadder ladder);
  // For the exchange of budgets: the plan in force after a round of reports. Any thread.
  Result<coordinator::BudgetPlan> balance(std::span<const coordinator::BudgetReport> reports);
  // Refuses new requests from now on and waits until the accepted ones ended; those still there at
  // the deadline are cancelled. DEADLINE_EXCEEDED when it came to that.
  Status drain(Deadline deadline);
  // New requests are refused from now on; returns at once.
  void start_draining();
  // Ends what is left with UNAVAILABLE, tells the stages to shut down and joins the threads.
  void stop();

  Result<engine::RequestHandle> submit(engine::EngineRequest request,
                                       std::shared_ptr<engine::EventSink> sink) override;
  bool cancel(engine::RequestHandle handle) override;
  void finish_choice(engine::RequestHandle handle, std::int32_t choice) override;
  engine::EngineStats stats() const override;
  engine::EngineSnapshot snapshot() const override;
  const engine::EngineLimits& limits() const override { return limits_; }
  Status admission() const override;

 private:
  struct Client {
    std::shared_ptr<engine::EventSink> sink;
    std::string request_id;
  };

  void schedule_loop();
  bool send_plans(std::unique_lock<std::mutex>& lock);
  engine::EngineStats locked_stats() const;
  void note_moves(const coordinator::BudgetPlan& before,
                  const coordinator::BudgetDecision& decision);
  Status take_result(const control::StepResult& result);
  void dispatch_events(std::unique_lock<std::mutex>& lock);
  static void end(const Client& client, const Status& status,
                  const engine::RequestSummary& summary);
  void fail(std::unique_lock<std::mutex>& lock, const Status& status);
  Status check_step_deadline() const;
  // A moment of the scheduler, when a recording is on.
  void record(TraceRecord moment) const;
  void record_plan(const control::StepPlan& plan) const;
  Status take_messages(const Result<comm::Message>& message);
  Status take_message(const comm::Message& message);
  void wake();
  std::int64_t now_us() const;
  std::string slowest_stages(std::uint64_t step) const;

  comm::HostGroup& host_;
  const engine::EngineLimits limits_;
  const PipelineEngineOptions options_;
  const OnFailure on_failure_;
  const std::chrono::steady_clock::time_point epoch_ = std::chrono::steady_clock::now();

  mutable std::mutex mutex_;
  std::condition_variable drained_;  // drain()
  // Guarded by mutex_.
  coordinator::Scheduler scheduler_;
  std::unordered_map<engine::RequestHandle, Client> clients_;
  std::vector<engine::StageState> stages_;
  std::vector<std::uint64_t> last_step_;  // [n_stages] the last step each stage reported
  std::uint64_t budget_rounds_ = 0;
  std::int64_t budget_us_ = 0;        // of decisions
  std::vector<double> level_ratios_;  // of the balancer's ladder
  std::size_t own_level_ = 0;
  std::deque<engine::BudgetMove> moves_;
  // Since when there is no request, 0 while there is one; and how long there was none since the
  // last plan.
  std::int64_t idle_since_us_ = 1;
  std::int64_t idle_us_ = 0;
  std::vector<std::int64_t> reported_us_;  // [n_stages] when each last reported
  engine::StepTokens step_tokens_;
  Status failure_;
  bool stopping_ = false;
  bool woken_ = false;  // a wake() is under way

  std::thread schedule_thread_;
};

}  // namespace spindle::worker
