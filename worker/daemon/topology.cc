#include "worker/daemon/topology.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <set>

#include "cluster/comm/agreement.h"
#include "kernels/cuda/devices.h"
#include "worker/daemon/cluster_start.h"
#include "worker/daemon/stage_costs.h"

namespace spindle::worker {
namespace {

Result<std::int64_t> resolve_max_model_len(const RankSettings& settings,
                                           const model::ModelConfig& model) {
  if (settings.max_model_len == 0) return model.max_position_embeddings;
  if (settings.max_model_len > model.max_position_embeddings) {
    return invalid_argument("model.max_model_len is " + std::to_string(settings.max_model_len) +
                            ", the model's max_position_embeddings is " +
                            std::to_string(model.max_position_embeddings));
  }
  return settings.max_model_len;
}

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

std::int64_t measured_memory(const RankSettings& settings, const DeviceFacts& device,
                             int ranks_here, bool pool_is_stated) {
  if (settings.device == ComputeDevice::kCpu || device.total_bytes == 0) return 0;
  const double share = pool_is_stated ? 1.0 : settings.gpu_memory_utilization;
  return static_cast<std::int64_t>(static_cast<double>(device.total_bytes) * share / ranks_here);
}

void set_speeds(const RankSettings& settings, std::span<const DeviceFacts> facts,
                std::vector<coordinator::StageDevice>& devices) {
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

std::string what_to_change(const RankSettings& settings) {
  std::string fields;
  if (!settings.kv_bytes.empty()) fields = "kv.memory_bytes";
  if (!settings.device_memory_bytes.empty()) {
    fields += (fields.empty() ? "" : " or ") + std::string("cluster.device_memory_bytes");
  } else if (settings.kv_bytes.empty()) {
    fields = "compute.gpu_memory_utilization";
  }
  return "; change " + fields + ", lower model.max_model_len or start more ranks";
}

// One line for each fact, so that a difference is named by its line.
std::string model_text(const model::ModelConfig& model, std::int64_t max_model_len) {
  std::string text;
  const auto line = [&text](const char* name, std::int64_t value) {
    text += std::string(name) + " = " + std::to_string(value) + "\n";
  };
  line("num_hidden_layers", model.n_layers);
  line("hidden_size", model.hidden_size);
  line("intermediate_size", model.intermediate_size);
  line("num_attention_heads", model.n_heads);
  line("num_key_value_heads", model.n_kv_heads);
  line("head_dim", model.head_dim);
  line("vocab_size", model.vocab_size);
  line("tie_word_embeddings", model.tie_word_embeddings ? 1 : 0);
  line("max_position_embeddings", model.max_position_embeddings);
  line("max_model_len", max_model_len);
  text += "torch_dtype = " + model.torch_dtype + "\n";
  return text;
}

std::string ranges_text(const Topology& topology) {
  std::string text = "stages = " + std::to_string(topology.partition.stages.size()) + "\n";
  for (const coordinator::StagePrediction& stage : topology.partition.stages) {
    text += "first layer " + std::to_string(stage.layers.first) + ", layers " +
            std::to_string(stage.layers.count) + "\n";
  }
  return text;
}

std::string encode(const DeviceFacts& facts) {
  return std::to_string(facts.total_bytes) + " " + std::to_string(facts.speed) + " " + facts.id;
}

bool take_number(std::string_view& text, std::uint64_t& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end == text.data() + text.size() || *end != ' ') return false;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()) + 1);
  return true;
}

Result<std::vector<DeviceFacts>> gather_facts(const DeviceFacts& mine, comm::HostGroup& host,
                                              Deadline deadline) {
  const auto messages = host.all_gather(encode(mine), deadline);
  if (!messages.ok()) return messages.status();
  std::vector<DeviceFacts> all;
  for (const std::string& message : *messages) {
    DeviceFacts facts;
    std::string_view rest = message;
    if (!take_number(rest, facts.total_bytes) || !take_number(rest, facts.speed)) {
      return internal_error("rank " + std::to_string(all.size()) +
                            " describes its device in a way that cannot be understood");
    }
    facts.id = std::string(rest);
    all.push_back(std::move(facts));
  }
  return all;
}

std::string megabytes(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text;
}

}  // namespace

Result<DeviceFacts> read_device_facts(const RankSettings& settings) {
  if (settings.device == ComputeDevice::kCpu) {
    return DeviceFacts{settings.host_name, settings.host_memory_bytes,
                       static_cast<std::uint64_t>(std::max(1, settings.n_threads))};
  }
  const auto devices = kernels::list_cuda_devices();
  if (!devices.ok()) return devices.status();
  if (devices->empty()) return unavailable("compute.device is CUDA, and this host has no GPU");
  const kernels::CudaDevice& device =
      (*devices)[static_cast<std::size_t>(settings.local_rank) % devices->size()];
  return DeviceFacts{device.unique_id, device.total_bytes, device.memory_bytes_per_second};
}

Result<Topology> plan_topology(const RankSettings& settings, const model::ModelConfig& model,
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

  coordinator::PartitionProblem problem =
      stage_costs(settings, model, *max_model_len, static_cast<int>(n_ranks));
  for (std::size_t rank = 0; rank < n_ranks; ++rank) {
    coordinator::StageDevice& device = problem.devices[rank];
    device.kv_bytes = (*pools)[rank];
    device.memory_bytes = (*memory)[rank] > 0
                              ? (*memory)[rank]
                              : measured_memory(settings, facts[rank], ranks_on(facts[rank], facts),
                                                device.kv_bytes > 0);
  }
  set_speeds(settings, facts, problem.devices);
  const bool pools_differ = std::set(pools->begin(), pools->end()).size() > 1;
  if (!settings.device_memory_bytes.empty() || pools_differ) {
    problem.kv_weight = coordinator::kStatedMemoryKvWeight;
  }
  auto partition = settings.layers_per_stage.empty()
                       ? coordinator::partition_layers(problem)
                       : coordinator::partition_as_told(problem, settings.layers_per_stage);
  if (!partition.ok()) {
    if (partition.status().code() != StatusCode::kResourceExhausted) return partition.status();
    return Status(StatusCode::kResourceExhausted,
                  partition.status().message() + what_to_change(settings));
  }
  return Topology{model, *max_model_len, std::move(problem.devices), std::move(*partition)};
}

Result<Topology> agree_on_topology(const RankSettings& settings, comm::HostGroup& host,
                                   Deadline deadline) {
  // Every rank takes part in every step, also when it has failed.
  const auto model = model::load_model_config(settings.model_dir);
  Status status = model.status();
  const auto mine = read_device_facts(settings);
  if (status.ok()) status = mine.status();
  std::int64_t max_model_len = 0;
  if (status.ok()) {
    const auto resolved = resolve_max_model_len(settings, *model);
    status = resolved.status();
    if (resolved.ok()) max_model_len = *resolved;
  }
  if (status = agree_on_outcome(host, status, deadline); !status.ok()) return status;
  status = comm::verify_same_on_all_ranks(host, "the model", model_text(*model, max_model_len),
                                          deadline);
  if (!status.ok()) return status;
  const auto facts = gather_facts(*mine, host, deadline);
  if (!facts.ok()) return facts.status();
  auto topology = plan_topology(settings, *model, *facts);
  if (status = agree_on_outcome(host, topology.status(), deadline); !status.ok()) return status;
  status = comm::verify_same_on_all_ranks(host, "the layers of the stages", ranges_text(*topology),
                                          deadline);
  if (!status.ok()) return status;
  return topology;
}

std::vector<std::string> describe_topology(const Topology& topology) {
  const coordinator::LayerPartition& partition = topology.partition;
  std::vector<std::string> lines;
  for (std::size_t i = 0; i < partition.stages.size(); ++i) {
    const coordinator::StagePrediction& stage = partition.stages[i];
    const int last = stage.layers.first + stage.layers.count - 1;
    char share[32];
    std::snprintf(share, sizeof(share), "%.1f %%", 100 * stage.time_share);
    std::string line = "plan: stage " + std::to_string(i) + ": layers " +
                       std::to_string(stage.layers.first) + "-" + std::to_string(last) + ", " +
                       share + " of the time, weights " + megabytes(stage.weight_bytes);
    if (stage.kv_bytes >= 0) {
      line +=
          ", KV " + megabytes(stage.kv_bytes) + " = " + std::to_string(stage.kv_tokens) + " tokens";
    }
    if (partition.stages.size() == 1) {
      lines.push_back(std::move(line));
      break;
    }
    if (partition.slowest == static_cast<int>(i)) line += "; the slowest";
    if (partition.tightest == static_cast<int>(i)) line += "; the tightest";
    lines.push_back(std::move(line));
  }
  return lines;
}

}  // namespace spindle::worker
