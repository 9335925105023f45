#pragma once
// Everything one rank needs to compute: its layers' weights, KV pages, threads and stage loop.
// The daemon makes one; tests make several in a process, over the in-process groups.

#include <cstdint>
#include <memory>
#include <string>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kvstore/kv_store.h"
#include "proto/control.pb.h"
#include "worker/daemon/compute_parts.h"
#include "worker/daemon/rank_settings.h"
#include "worker/daemon/topology.h"
#include "worker/model/model_config.h"
#include "worker/pipeline/stage_worker.h"

namespace spindle::worker {

// Owns the context, the store, the stage and its worker; not the groups it is given.
// Thread-safety: create on one thread; worker().run() on one; the rest while it does not run.
class RankRuntime {
 public:
  // Reads the rank's own weights; `topology` is what all ranks agreed on, with a stage for each
  // rank of `host`. Errors name the file, field or limit at fault.
  static Result<std::unique_ptr<RankRuntime>> create(const RankSettings& settings,
                                                     const Topology& topology,
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
