#pragma once
// What is known of a cluster before anything is loaded: the configuration, the model's shape and
// the devices. The daemon plans its stages from it, and so does `spindle plan`.
//
// Thread-safety: plain values.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/core/dtype.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::coordinator {

enum class ComputeDevice : std::uint8_t { kCpu, kCuda };

// A model as far as sizes go.
struct ModelShape {
  int n_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  std::int64_t max_position_embeddings = 0;
  bool ties_embeddings = false;  // the head is the embedding
  bool has_f32_weights = false;  // of the matrices in the checkpoint; else 16 bits
};

struct ClusterSettings {
  std::int64_t max_model_len = 0;     // 0: the model's
  std::vector<int> layers_per_stage;  // empty: the partitioner's choice
  // Each empty, one entry for all ranks, or one per rank.
  std::vector<std::int64_t> device_memory_bytes;  // empty: what is measured (stage_plan.h)
  std::vector<std::int64_t> kv_bytes;             // KV pool; empty: what memory leaves
  int max_num_seqs = 64;
  int max_num_batched_tokens = 512;
  bool bf16_math = false;  // on the CPU: oneDNN in bf16
  DType kv_dtype = DType::kF16;
  std::uint64_t token_table_bytes = 256ULL << 20;  // the largest table of layer 0's K and V by id
  ComputeDevice device = ComputeDevice::kCpu;
  double gpu_memory_utilization = 0.9;
};

// What a rank knows of the device it computes on.
struct DeviceFacts {
  std::string id;                 // the same for ranks that share a device, or the memory of a host
  std::uint64_t total_bytes = 0;  // 0: unknown
  std::uint64_t speed = 0;        // in a unit that all ranks share; 0: unknown
};

// The whole model's KV as the planner sees it.
kvstore::KvModel make_kv_model(const ModelShape& model, DType kv_dtype, std::int64_t max_model_len,
                               bool has_token_table);

}  // namespace spindle::coordinator
