#pragma once
// Who computes which layers: planned by every rank from the same facts, compared, and only then
// acted on. Nothing is allocated before all ranks agree.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cluster/comm/host_group.h"
#include "cluster/coordinator/cluster_settings.h"
#include "cluster/coordinator/layer_partition.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"
#include "worker/daemon/rank_settings.h"
#include "worker/model/model_config.h"

namespace spindle::worker {

using coordinator::DeviceFacts;

struct Topology {
  model::ModelConfig model;
  std::int64_t max_model_len = 0;
  std::vector<coordinator::StageDevice> devices;  // of each stage, as the partition saw them
  coordinator::LayerPartition partition;
};

// UNAVAILABLE when the settings say GPU and this host has none.
Result<DeviceFacts> read_device_facts(const RankSettings& settings);

// Pure: coordinator::plan_stages. `facts` has an element for each rank. Errors name the field and
// the rank at fault.
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
