#pragma once
// What a rank is told before it starts: the configuration, and what the host says of itself.

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/linear.h"
#include "worker/pipeline/stage_worker.h"

namespace spindle::worker {

enum class ComputeDevice : std::uint8_t { kCpu, kCuda };

struct RankSettings {
  std::filesystem::path model_dir;
  bool dummy_weights = false;
  std::int64_t max_model_len = 0;     // 0: the model's
  std::vector<int> layers_per_stage;  // empty: the partitioner's choice
  // Each empty, one entry for all ranks, or one per rank.
  std::vector<std::int64_t> device_memory_bytes;  // empty: what is measured (topology.h)
  std::vector<std::int64_t> kv_bytes;             // KV pool; empty: what memory leaves
  int max_num_seqs = 64;
  int max_num_batched_tokens = 512;
  kernels::LinearMath linear_math = kernels::LinearMath::kF32;
  DType kv_dtype = DType::kF16;
  std::uint64_t token_table_bytes = 256ULL << 20;  // LlamaStageConfig
  int n_threads = 1;
  ComputeDevice device = ComputeDevice::kCpu;
  int local_rank = 0;  // among the ranks of this host
  double gpu_memory_utilization = 0.9;
  std::chrono::milliseconds startup_timeout{600000};
  std::string host_name;
  std::uint64_t host_memory_bytes = 0;       // 0: unknown
  std::uint64_t available_memory_bytes = 0;  // of it; 0: unknown
  int ranks_on_host = 1;
  StageWorkerOptions worker;
};

}  // namespace spindle::worker
