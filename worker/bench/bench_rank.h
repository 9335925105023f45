#pragma once
// A rank of a benchmark under mpirun: what the daemon starts, without sockets and text.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cluster/comm/host_group.h"
#include "cluster/comm/mpi_world.h"
#include "cluster/coordinator/scheduler.h"
#include "worker/daemon/rank_runtime.h"
#include "worker/trace/step_recorder.h"

namespace spindle::worker {

// What the benchmarks have in common.
struct BenchOptions {
  std::string model_dir;
  std::string json_file;
  std::string device = "cpu";
  bool dummy = false;
  int max_num_seqs = 32;
  int max_num_batched_tokens = 512;
  std::int64_t max_model_len = 0;  // 0: the model's
  std::vector<int> layers_per_stage;
  kvstore::KvPolicy kv_policy;

  bool on_gpu() const { return device == "cuda"; }
};

// Refers to `options` until the app has parsed.
void add_bench_options(CLI::App& app, BenchOptions& options);

// `recorder` is the stage worker's, off until somebody starts it.
struct BenchRank {
  std::unique_ptr<StepRecorder> recorder;
  std::unique_ptr<RankRuntime> runtime;
  std::vector<control::StageInfo> stages;
};

// Collective.
Result<BenchRank> start_bench_rank(comm::MpiWorld& world, const BenchOptions& options,
                                   const std::vector<std::int64_t>& kv_bytes);
int bench_micro_batches(const std::vector<control::StageInfo>& stages);
coordinator::SchedulerConfig bench_scheduler_config(const BenchRank& rank,
                                                    const BenchOptions& options);

}  // namespace spindle::worker
