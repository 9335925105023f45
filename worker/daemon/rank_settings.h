#pragma once
// What a rank is told before it starts: the configuration, and what the host says of itself.

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "cluster/coordinator/cluster_settings.h"
#include "worker/pipeline/stage_worker.h"
#include "worker/stage/stage.h"

namespace spindle::worker {

using coordinator::ComputeDevice;

// What the stages are planned from is the base.
struct RankSettings : coordinator::ClusterSettings {
  std::filesystem::path model_dir;
  bool dummy_weights = false;
  int n_threads = 1;
  int local_rank = 0;  // among the ranks of this host
  std::chrono::milliseconds startup_timeout{600000};
  std::string host_name;
  std::uint64_t host_memory_bytes = 0;       // 0: unknown
  std::uint64_t available_memory_bytes = 0;  // of it; 0: unknown
  int ranks_on_host = 1;
  StageWorkerOptions worker;
  // What the rank computes with instead of its stage; for tests. Empty: the stage itself.
  std::function<std::unique_ptr<Stage>(std::unique_ptr<Stage>)> wrap_stage = {};
};

}  // namespace spindle::worker
