#pragma once
// Who computes which layers, and how large everybody's KV pool becomes: planned by every rank from
// the same facts (worker/daemon/topology.h), and by `spindle plan` from stated ones.
//
// Memory of a rank for the partition:
//   cluster.device_memory_bytes, if stated; else on a GPU its total memory times
//   compute.gpu_memory_utilization (or all of it, when kv.memory_bytes says the pool) divided by
//   the ranks on that GPU; else, on the CPU, unknown: what is free there changes from start to
//   start, and a partition must not.
// Speed: on a GPU the peak bandwidth of its memory divided by the ranks on it; on the CPU the
// rank's threads; all equal when one of them is not known. Memory counts for more than time
// (layer_partition.h, kStatedMemoryKvWeight) when cluster.device_memory_bytes is stated or the
// entries of kv.memory_bytes differ.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <span>
#include <vector>

#include "cluster/coordinator/cluster_settings.h"
#include "cluster/coordinator/layer_partition.h"
#include "kernels/core/status.h"

namespace spindle::coordinator {

struct StagePlan {
  std::int64_t max_model_len = 0;
  std::vector<StageDevice> devices;  // of each stage, as the partition saw them
  LayerPartition partition;
};

// The longest sequence. INVALID_ARGUMENT beyond the model's positions.
Result<std::int64_t> resolve_max_model_len(const ClusterSettings& settings,
                                           const ModelShape& model);

// `facts` has an element for each rank. Errors name the field and the rank at fault.
Result<StagePlan> plan_stages(const ClusterSettings& settings, const ModelShape& model,
                              std::span<const DeviceFacts> facts);

// KV of one sequence of max_model_len on a stage, in whole pages: the least pool.
std::uint64_t one_sequence_bytes(const ClusterSettings& settings, const ModelShape& model,
                                 std::int64_t max_model_len, int n_layers);

// What max_num_seqs sequences of max_model_len would take (`wanted_bytes`), but at most half of the
// host's free memory divided by its ranks; `wanted_bytes` when the free memory is not known.
std::uint64_t default_kv_bytes(std::uint64_t wanted_bytes, std::uint64_t available_memory_bytes,
                               int ranks_on_host);

// The KV pool of a rank on the CPU.
std::uint64_t cpu_pool_bytes(const StageDevice& device, const StagePrediction& stage,
                             std::uint64_t one_sequence_bytes, int max_num_seqs,
                             std::uint64_t available_memory_bytes, int ranks_on_host);

// What a rank on a GPU sees when weights and workspace are there.
struct GpuMemory {
  std::uint64_t total_bytes = 0;
  std::uint64_t free_at_start = 0;  // before them
  std::uint64_t free_now = 0;
  std::uint64_t scratch_bytes = 0;  // that scores and encoding will take
  std::uint64_t stated_bytes = 0;   // of the GPU, that the rank may use; 0: the share
  std::uint64_t planned_bytes = 0;  // of weights and workspace, as the partition counts them
  double utilization = 0.9;         // of the GPU, that its ranks may use together
  int ranks_here = 1;               // on this GPU
};
// The KV pool: what is free after weights and workspace, less the scratch, within what is stated
// for the rank or the share of the GPU that its ranks may use together.
std::uint64_t gpu_pool_bytes(const GpuMemory& memory);

}  // namespace spindle::coordinator
