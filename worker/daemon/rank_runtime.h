#pragma once
// Everything one rank needs to compute: its layers' weights, KV pages, threads and stage loop.
// The daemon makes one; tests make several in a process, over the in-process groups.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "cluster/coordinator/layer_partition.h"
#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kernels/linear.h"
#include "kvstore/kv_store.h"
#include "proto/control.pb.h"
#include "worker/daemon/compute_parts.h"
#include "worker/model/model_config.h"
#include "worker/pipeline/stage_worker.h"

namespace spindle::worker {

enum class ComputeDevice : std::uint8_t { kCpu, kCuda };

struct RankSettings {
  std::filesystem::path model_dir;
  bool dummy_weights = false;
  std::int64_t max_model_len = 0;     // 0: the model's
  std::vector<int> layers_per_stage;  // empty: partition by weight bytes
  int max_num_seqs = 64;
  int max_num_batched_tokens = 512;
  kernels::LinearMath linear_math = kernels::LinearMath::kF32;
  DType kv_dtype = DType::kF16;
  std::uint64_t token_table_bytes = 256ULL << 20;  // LlamaStageConfig
  std::uint64_t kv_bytes = 0;                      // 0: default_kv_bytes()
  int n_threads = 1;
  ComputeDevice device = ComputeDevice::kCpu;
  int local_rank = 0;  // among the ranks of this host
  double gpu_memory_utilization = 0.9;
  std::chrono::milliseconds startup_timeout{600000};
  std::string host_name;
  std::uint64_t available_memory_bytes = 0;
  int ranks_on_host = 1;
  StageWorkerOptions worker;
};

// The layers of every stage: as told, or balanced by the bytes of weights a decode step reads.
Result<std::vector<coordinator::LayerRange>> plan_layers(const model::ModelConfig& model,
                                                         int n_stages,
                                                         const std::vector<int>& layers_per_stage);

// Owns the context, the store, the stage and its worker; not the groups it is given.
// Thread-safety: create on one thread; worker().run() on one; the rest while it does not run.
class RankRuntime {
 public:
  // Reads the rank's own weights. Errors name the file, field or limit at fault.
  static Result<std::unique_ptr<RankRuntime>> create(const RankSettings& settings,
                                                     comm::HostGroup& host,
                                                     comm::DeviceGroup& device);

  const model::ModelConfig& model() const { return model_; }
  std::int64_t max_model_len() const { return max_model_len_; }
  const kvstore::KvStore& store() const { return *parts_.store; }
  StageWorker& worker() { return *worker_; }
  control::StageInfo info() const;

 private:
  RankRuntime() = default;

  model::ModelConfig model_;
  std::int64_t max_model_len_ = 0;
  int rank_ = 0;
  std::string host_name_;
  std::unique_ptr<CpuContext> context_;
  ComputeParts parts_;
  std::unique_ptr<StageWorker> worker_;
};

}  // namespace spindle::worker
