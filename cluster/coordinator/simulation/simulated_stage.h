#pragma once
// One pipeline stage without a device: it carries out every plan as worker/pipeline/stage_worker
// does, with pages that are only counted (stage_kv.h), made-up scores at boundaries and a model
// whose next token is a hash (token_model.h). It refuses whatever the control protocol rules out.
//
// Thread-safety: none.

#include <cstdint>
#include <utility>
#include <vector>

#include "cluster/coordinator/simulation/fault.h"
#include "cluster/coordinator/simulation/latency_model.h"
#include "cluster/coordinator/simulation/sequence_table.h"
#include "cluster/coordinator/simulation/stage_kv.h"
#include "cluster/coordinator/simulation/token_model.h"
#include "kernels/core/status.h"
#include "proto/control.pb.h"

namespace spindle::coordinator::simulation {

SamplingKey sampling_key(const control::OpenSequence& open);

struct SimulatedStageConfig {
  int stage = 0;
  bool is_last = false;
  StageKvConfig kv;
  TokenModel tokens;
  FaultInjector* faults = nullptr;  // may be null; outlives the stage
};

class SimulatedStage {
 public:
  explicit SimulatedStage(const SimulatedStageConfig& config) : config_(config), kv_(config.kv) {}

  // Fills in the step's result and what it asked of the stage. An error says what in the plan
  // cannot be done; the stage is not usable afterwards.
  Status carry_out(const control::StepPlan& plan, control::StepResult& result, StepWork& work);

  const StageKv& kv() const { return kv_; }
  // Totals over the first boundaries of prompts, for budget reports.
  std::uint64_t planned_bytes() const { return planned_bytes_; }
  std::uint64_t kept_bytes() const { return kept_bytes_; }

 private:
  struct Sequence {
    SamplingKey key;
    std::int64_t n_tokens = 0;
    std::uint64_t ran_in = 0;  // the last step
    std::int64_t prompt_tokens = 0;
    std::vector<std::uint64_t> hashes;  // of the first i tokens; on the last stage
    std::vector<std::int32_t> boundaries;
    std::size_t next_boundary = 0;
    control::BoundaryNeeds needs;
    bool is_scored = false;  // a boundary that is not carried out yet
    bool is_compressed = false;
    std::int64_t compressed_at = 0;
    std::int64_t first_run = -1;
    int sinks = 0;
  };

  bool strikes(Fault fault) {
    return config_.faults != nullptr && config_.faults->strikes(fault, step_);
  }
  Status compress_all(const control::StepPlan& plan, bool after_runs, control::StepResult& result,
                      StepWork& work);
  Status grow_all(const control::StepPlan& plan, bool after_runs, control::StepResult& result);
  Status compress(const control::Compress& order, control::StepResult& result, StepWork& work);
  Status fork(const control::ForkSequence& fork);
  Status open(const control::OpenSequence& open);
  Status free(std::uint64_t sequence, control::StepResult& result);
  Status run(const control::Run& run, control::StepResult& result, StepWork& work);
  Status check_run(const control::Run& run, const Sequence& sequence) const;
  void score(std::uint64_t id, Sequence& sequence, control::StepResult& result);
  void sample(const control::Run& run, const Sequence& sequence, control::StepResult& result);
  std::int64_t reserve_pages(const control::OpenSequence& open);
  Sequence make_sequence(const control::OpenSequence& open) const;

  SimulatedStageConfig config_;
  StageKv kv_;
  SequenceTable<Sequence> sequences_;
  std::uint64_t step_ = 0;
  std::uint64_t planned_bytes_ = 0;
  std::uint64_t kept_bytes_ = 0;
};

}  // namespace spindle::coordinator::simulation
