#pragma once
// One rank's stage thread: takes step plans from rank 0 in order, receives activations from the
// stage before, computes, passes activations on, and reports every step to rank 0. The last stage
// samples. While it waits for a GPU to draw a step's tokens, it begins the next step, if its plan
// is there and touches nothing that the report of this one still needs.

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "kernels/core/status.h"
#include "kvstore/kv_store.h"
#include "proto/control.pb.h"
#include "worker/pipeline/budget_exchange.h"
#include "worker/stage/stage.h"
#include "worker/stage/token_sampler.h"
#include "worker/trace/stage_tracer.h"

namespace spindle::worker {

struct StageWorkerOptions {
  // How long a neighbour may take for its part of a step.
  std::chrono::milliseconds step_timeout{120000};
  // Called on the stage's thread after every step, with its number.
  std::function<void(std::uint64_t step)> on_step = {};
  // What the stage thread does, while it is on. Not owned; null: nothing.
  StepRecorder* recorder = nullptr;
  // Walks all pages after every step; for tests.
  bool check_invariants = false;
};

// Does not own the groups, the stage, the store and the context; all outlive it.
// Thread-safety: run() on one thread.
class StageWorker {
 public:
  StageWorker(comm::HostGroup& host, comm::DeviceGroup& device, Stage& stage,
              kvstore::KvStore& store, const CpuContext& context, StageWorkerOptions options);

  // Works until a plan says shutdown (OK), the host group is shut down or fails, or a step fails
  // (its status, also reported to rank 0). Waits for the next plan without limit: that rank 0 is
  // alive is the peer monitor's business.
  Status run();
  // On rank 0, before run(); a plan that asks for reports needs it.
  void set_decide_budget(BudgetExchange::Decide decide) { budgets_.set_decide(std::move(decide)); }

 private:
  struct Step {
    control::StepPlan plan;
    control::StepResult result;
    Status status;               // of what was done of it so far
    bool has_begun = false;      // up to its forward pass
    bool has_kv_report = false;  // in `result`
  };

  Status work();
  Result<Step> read_plan(const comm::Message& message) const;
  void carry_out(Step& step);
  // A step up to its forward pass.
  void begin(Step& step);
  // begin() of the next one, if its plan is there and allows it, while `step` waits for its tokens.
  // False: its plan is there, or none will come.
  bool begin_next(Step& step);
  bool only_tokens_are_left(const control::StepPlan& plan) const;
  bool may_begin_early(const control::StepPlan& plan) const;
  Status report_budget(const control::StepPlan& plan, const control::StepResult& result);
  // `part` of a step, with what a device throws as a Status.
  template <typename Part>
  Status guarded(Part&& part) const;
  Status begin_runs(const control::StepPlan& plan);
  Status finish_runs(Step& step);
  Status apply_sequences(const control::StepPlan& plan, control::StepResult& result);
  Status free(std::uint64_t sequence, control::StepResult& result);
  // Boundaries that the plan's runs reach, and the growth behind them.
  Status carry_out_after_runs(const control::StepPlan& plan, control::StepResult& result);
  // Those that come before the plan's runs, or those that come after.
  Status grow_all(const control::StepPlan& plan, bool after_runs, control::StepResult& result);
  Status compress_all(const control::StepPlan& plan, bool after_runs, control::StepResult& result);
  Status compress(const control::Compress& order, control::StepResult& result);
  void open_boundaries(const control::OpenSequence& open);
  std::int64_t reserve_pages(const google::protobuf::RepeatedField<std::int64_t>& pages) const;
  Status score_prompt(const control::StepPlan& plan, control::StepResult& result);
  comm::TensorTimes traced_tensor_times();
  void trace_transfer(std::uint64_t step, const comm::TensorTimes& before, std::size_t n_bytes,
                      bool sent);
  void score_boundaries(const control::StepPlan& plan, control::StepResult& result);
  Status sample(Step& step);
  void report_times(control::StepResult& result);
  void report_kv(Step& step);

  comm::HostGroup& host_;
  comm::DeviceGroup& device_;
  Stage& stage_;
  kvstore::KvStore& store_;
  TokenSampler sampler_;
  BudgetExchange budgets_;
  // Of all prompts' first boundaries (coordinator::BudgetReport).
  std::uint64_t planned_bytes_ = 0;
  std::uint64_t kept_bytes_ = 0;
  StageWorkerOptions options_;
  StageTracer tracer_;
  bool began_ = false;  // had its first plan
  // Came while the last step's tokens were awaited.
  std::optional<Step> next_;
  Status unreadable_;  // of a plan that came then
  std::uint64_t awaited_epoch_ = 0;
  comm::TensorTimes reported_tensor_times_;
  std::chrono::steady_clock::time_point layers_reported_at_;
  std::vector<float> score_logits_;
  std::vector<StageRun> runs_;
  std::vector<std::int32_t> tokens_;
  std::vector<SampleRequest> requests_;
  std::vector<std::int32_t> sampled_;
};

}  // namespace spindle::worker
