#include "worker/daemon/topology.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <utility>

#include "cluster/comm/agreement.h"
#include "cluster/coordinator/stage_plan.h"
#include "kernels/cuda/devices.h"
#include "worker/daemon/cluster_start.h"
#include "worker/model/model_shape.h"

namespace spindle::worker {
namespace {

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
  auto plan =
      coordinator::plan_stages(settings, model::model_shape(model, settings.dummy_weights), facts);
  if (!plan.ok()) return plan.status();
  return Topology{model, plan->max_model_len, std::move(plan->devices), std::move(plan->partition)};
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
    const auto resolved = coordinator::resolve_max_model_len(
        settings, model::model_shape(*model, settings.dummy_weights));
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
