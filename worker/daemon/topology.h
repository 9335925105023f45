#pragma once
// Who computes which layers: planned by every rank from the same facts, compared, and only then
// acted on. Nothing is allocated before all ranks agree.
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

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cluster/comm/host_group.h"
#include "cluster/coordinator/layer_partition.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"
#include "worker/daemon/rank_settings.h"
#include "worker/model/model_config.h"

namespace spindle::worker {

// What a rank knows of the device it computes on.
struct DeviceFacts {
  std::string id;                 // the same for ranks that share a device, or the memory of a host
  std::uint64_t total_bytes = 0;  // 0: unknown
  std::uint64_t speed = 0;        // in a unit that all ranks share; 0: unknown
};

struct Topology {
  model::ModelConfig model;
  std::int64_t max_model_len = 0;
  std::vector<coordinator::StageDevice> devices;  // of each stage, as the partition saw them
  coordinator::LayerPartition partition;
};

// UNAVAILABLE when the settings say GPU and this host has none.
Result<DeviceFacts> read_device_facts(const RankSettings& settings);

// Pure. `facts` has an element for each rank. Errors name the field and the rank at fault.
Result<Topology> plan_topology(const RankSettings& settings, const model::ModelConfig& model,
                               std::span<const DeviceFacts> facts);

// A collective: reads the model's shape and the device, exchanges facts, plans, and compares the
// model's shape and the ranges. OK on every rank or an error on every rank that names who failed or
// differs.
Result<Topology> agree_on_topology(const RankSettings& settings, comm::HostGroup& host,
                                   Deadline deadline);

// For people: a line for each stage with its layers, share of the time, weights and KV where memory
// is known; of several stages the slowest and the tightest are named.
std::vector<std::string> describe_topology(const Topology& topology);

}  // namespace spindle::worker
