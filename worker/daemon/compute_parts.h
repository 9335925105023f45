#pragma once
// What one rank computes with: a stage and its KV store, on the CPU or on a GPU, and the group its
// activations travel by.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kvstore/kv_store.h"
#include "worker/model/llama_weights.h"
#include "worker/stage/stage.h"

namespace spindle::worker {

// Owns whatever the store and the stage refer to: a context, a device group.
class ComputeOwner {
 public:
  virtual ~ComputeOwner() = default;
};

// Destroyed from the last member to the first.
struct ComputeParts {
  std::unique_ptr<ComputeOwner> owner;
  comm::DeviceGroup* device_group = nullptr;  // owned by `owner`, or the caller's
  std::unique_ptr<kvstore::KvStore> store;
  std::unique_ptr<Stage> stage;
  std::string device;           // as people read it
  std::string instruction_set;  // equal where results are the same bits
};

struct ComputeOptions {
  LlamaStageConfig stage;
  kvstore::KvStoreConfig store;          // budget_bytes: the pool, or 0 for what is left on a GPU
  std::uint64_t one_sequence_bytes = 0;  // of max_model_len: the least pool
  std::function<Result<model::LlamaStageWeights>()> load_weights;
  int local_rank = 0;
  double gpu_memory_utilization = 0.9;
  std::uint64_t device_memory_bytes = 0;  // that the rank may use of a GPU; 0: the share above
  std::uint64_t planned_bytes = 0;        // of weights and workspace, as the partition counts them
  std::chrono::milliseconds startup_timeout{600000};
};

Result<ComputeParts> make_cpu_parts(const ComputeOptions& options, const CpuContext& context,
                                    comm::DeviceGroup& device_group);

// Collective: every rank of `host` calls it. `device_group` moves host memory; it serves ranks that
// share a GPU, NCCL all others. UNIMPLEMENTED in builds without CUDA.
Result<ComputeParts> make_cuda_parts(const ComputeOptions& options, comm::HostGroup& host,
                                     comm::DeviceGroup& device_group);

// RESOURCE_EXHAUSTED or INVALID_ARGUMENT when a pool does not hold one sequence of full length.
Status check_pool(std::uint64_t pool_bytes, std::uint64_t one_sequence_bytes,
                  std::int64_t max_model_len);

}  // namespace spindle::worker
