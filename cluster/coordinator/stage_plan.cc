#include "cluster/coordinator/stage_plan.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "cluster/coordinator/stage_costs.h"
#include "kvstore/plan/kv_shape.h"

namespace spindle::coordinator {
namespace {

// One value for each rank; 0 where nothing is stated.
Result<std::vector<std::int64_t>> for_each_rank(const std::string& field,
                                                const std::vector<std::int64_t>& entries,
                                                std::size_t n_ranks) {
  if (entries.empty()) return std::vector<std::int64_t>(n_ranks, 0);
  if (entries.size() == 1) return std::vector<std::int64_t>(n_ranks, entries.front());
  if (entries.size() == n_ranks) return entries;
  return invalid_argument(field + " has " + std::to_string(entries.size()) + " entries for " +
                          std::to_string(n_ranks) +
                          (n_ranks == 1 ? " rank" : " ranks; give one for all or one for each"));
}

std::string rank_names(const std::vector<std::size_t>& ranks) {
  std::string names = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    names += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  }
  return names;
}

// What is stated for the ranks of one device is not more than it has.
Status check_stated_memory(const std::string& field, const std::vector<std::int64_t>& stated,
                           std::span<const DeviceFacts> facts) {
  for (const DeviceFacts& device : facts) {
    if (device.total_bytes == 0) continue;
    std::vector<std::size_t> ranks;
    std::uint64_t sum = 0;
    for (std::size_t rank = 0; rank < facts.size(); ++rank) {
      if (facts[rank].id != device.id) continue;
      ranks.push_back(rank);
      sum += static_cast<std::uint64_t>(stated[rank]);
    }
    if (sum <= device.total_bytes) continue;
    return invalid_argument(field + ": " + rank_names(ranks) +
                            (ranks.size() == 1 ? " is given " : " share a device and are given ") +
                            std::to_string(sum) + " bytes, the device has " +
                            std::to_string(device.total_bytes));
  }
  return ok_status();
}

int ranks_on(const DeviceFacts& device, std::span<const DeviceFacts> facts) {
  return static_cast<int>(std::count_if(
      facts.begin(), facts.end(), [&](const DeviceFacts& other) { return other.id == device.id; }));
}

std::int64_t measured_memory(const ClusterSettings& settings, const DeviceFacts& device,
                             int ranks_here, bool pool_is_stated) {
  if (settings.device == ComputeDevice::kCpu || device.total_bytes == 0) return 0;
  const double share = pool_is_stated ? 1.0 : settings.gpu_memory_utilization;
  return static_cast<std::int64_t>(static_cast<double>(device.total_bytes) * share / ranks_here);
}

void set_speeds(const ClusterSettings& settings, std::span<const DeviceFacts> facts,
                std::vector<StageDevice>& devices) {
  double fastest = 0;
  std::vector<double> speeds;
  for (const DeviceFacts& device : facts) {
    if (device.speed == 0) return;
    const int sharers = settings.device == ComputeDevice::kCuda ? ranks_on(device, facts) : 1;
    speeds.push_back(static_cast<double>(device.speed) / sharers);
    fastest = std::max(fastest, speeds.back());
  }
  for (std::size_t i = 0; i < devices.size(); ++i) devices[i].speed = speeds[i] / fastest;
}

std::string what_to_change(const ClusterSettings& settings) {
  std::string fields;
  if (!settings.kv_bytes.empty()) fields = "kv.memory_bytes";
  if (!settings.device_memory_bytes.empty()) {
    fields += (fields.empty() ? "" : " or ") + std::string("cluster.device_memory_bytes");
  } else if (settings.kv_bytes.empty()) {
    fields = "compute.gpu_memory_utilization";
  }
  return "; change " + fields + ", lower model.max_model_len or start more ranks";
}

}  // namespace

Result<std::int64_t> resolve_max_model_len(const ClusterSettings& settings,
                                           const ModelShape& model) {
  if (settings.max_model_len == 0) return model.max_position_embeddings;
  if (settings.max_model_len > model.max_position_embeddings) {
    return invalid_argument("model.max_model_len is " + std::to_string(settings.max_model_len) +
                            ", the model's max_position_embeddings is " +
                            std::to_string(model.max_position_embeddings));
  }
  return settings.max_model_len;
}

Result<StagePlan> plan_stages(const ClusterSettings& settings, const ModelShape& model,
                              std::span<const DeviceFacts> facts) {
  const std::size_t n_ranks = facts.size();
  const auto max_model_len = resolve_max_model_len(settings, model);
  if (!max_model_len.ok()) return max_model_len.status();
  const auto memory =
      for_each_rank("cluster.device_memory_bytes", settings.device_memory_bytes, n_ranks);
  if (!memory.ok()) return memory.status();
  const auto pools = for_each_rank("kv.memory_bytes", settings.kv_bytes, n_ranks);
  if (!pools.ok()) return pools.status();
  Status status = check_stated_memory("cluster.device_memory_bytes", *memory, facts);
  if (status.ok()) status = check_stated_memory("kv.memory_bytes", *pools, facts);
  if (!status.ok()) return status;

  PartitionProblem problem =
      stage_costs(settings, model, *max_model_len, static_cast<int>(n_ranks));
  for (std::size_t rank = 0; rank < n_ranks; ++rank) {
    StageDevice& device = problem.devices[rank];
    device.kv_bytes = (*pools)[rank];
    device.memory_bytes = (*memory)[rank] > 0
                              ? (*memory)[rank]
                              : measured_memory(settings, facts[rank], ranks_on(facts[rank], facts),
                                                device.kv_bytes > 0);
  }
  set_speeds(settings, facts, problem.devices);
  const bool pools_differ = std::set(pools->begin(), pools->end()).size() > 1;
  if (!settings.device_memory_bytes.empty() || pools_differ) {
    problem.kv_weight = kStatedMemoryKvWeight;
  }
  auto partition = settings.layers_per_stage.empty()
                       ? partition_layers(problem)
                       : partition_as_told(problem, settings.layers_per_stage);
  if (!partition.ok()) {
    if (partition.status().code() != StatusCode::kResourceExhausted) return partition.status();
    return Status(StatusCode::kResourceExhausted,
                  partition.status().message() + what_to_change(settings));
  }
  return StagePlan{*max_model_len, std::move(problem.devices), std::move(*partition)};
}

std::uint64_t one_sequence_bytes(const ClusterSettings& settings, const ModelShape& model,
                                 std::int64_t max_model_len, int n_layers) {
  const kvstore::KvShape shape{model.n_kv_heads, model.head_dim, settings.kv_dtype};
  return static_cast<std::uint64_t>(kvstore::stage_pages(shape, n_layers, max_model_len)) *
         shape.page_bytes();
}

std::uint64_t default_kv_bytes(std::uint64_t wanted_bytes, std::uint64_t available_memory_bytes,
                               int ranks_on_host) {
  if (available_memory_bytes == 0) return wanted_bytes;
  const auto ranks = static_cast<std::uint64_t>(std::max(1, ranks_on_host));
  return std::min(wanted_bytes, available_memory_bytes / 2 / ranks);
}

std::uint64_t cpu_pool_bytes(const StageDevice& device, const StagePrediction& stage,
                             std::uint64_t one_sequence_bytes, int max_num_seqs,
                             std::uint64_t available_memory_bytes, int ranks_on_host) {
  if (device.kv_bytes > 0) return static_cast<std::uint64_t>(device.kv_bytes);
  const std::uint64_t wanted = one_sequence_bytes * static_cast<std::uint64_t>(max_num_seqs);
  if (stage.kv_bytes >= 0) return std::min(wanted, static_cast<std::uint64_t>(stage.kv_bytes));
  return default_kv_bytes(wanted, available_memory_bytes, ranks_on_host);
}

std::uint64_t gpu_pool_bytes(const GpuMemory& memory) {
  const bool is_stated = memory.stated_bytes > 0;
  const double allowed =
      is_stated ? static_cast<double>(memory.stated_bytes)
                : static_cast<double>(memory.total_bytes) * memory.utilization / memory.ranks_here;
  // What ranks that share the device took meanwhile is not this one's: stated memory is counted by
  // the plan then, and is this rank's own part of what is free.
  const bool counts_plan = is_stated && memory.ranks_here > 1;
  const std::uint64_t used =
      counts_plan ? memory.planned_bytes
                  : memory.free_at_start - std::min(memory.free_now, memory.free_at_start);
  const double free_here =
      static_cast<double>(memory.free_now) / (is_stated ? 1 : memory.ranks_here);
  const double left = std::min(allowed - static_cast<double>(used), free_here);
  const double pool = left - static_cast<double>(memory.scratch_bytes);
  return pool > 0 ? static_cast<std::uint64_t>(pool) : 0;
}

kvstore::KvModel make_kv_model(const ModelShape& model, DType kv_dtype, std::int64_t max_model_len,
                               bool has_token_table) {
  kvstore::KvModel kv;
  kv.n_layers = model.n_layers;
  kv.n_heads = model.n_heads;
  kv.n_kv_heads = model.n_kv_heads;
  kv.head_dim = model.head_dim;
  kv.dtype = kv_dtype;
  kv.vocab_size = model.vocab_size;
  kv.max_model_len = max_model_len;
  kv.token_table = has_token_table;
  return kv;
}

}  // namespace spindle::coordinator
