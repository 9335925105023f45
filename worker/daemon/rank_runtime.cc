#include "worker/daemon/rank_runtime.h"

#include <algorithm>
#include <utility>

#include "cluster/coordinator/stage_plan.h"
#include "kernels/attention.h"
#include "worker/model/checkpoint.h"
#include "worker/model/llama_weights.h"
#include "worker/model/model_shape.h"

namespace spindle::worker {
namespace {

// Fixed, so that every rank and every run makes the same dummy model.
constexpr std::uint64_t kDummySeed = 0x5d1e;

Result<model::LlamaStageWeights> load_weights(const RankSettings& settings,
                                              const model::ModelConfig& model,
                                              model::LayerRange range, bool is_first,
                                              bool is_last) {
  if (settings.dummy_weights) {
    return model::make_dummy_llama_stage(model, range, is_first, is_last, kDummySeed);
  }
  auto checkpoint = model::Checkpoint::open(settings.model_dir);
  if (!checkpoint.ok()) return checkpoint.status();
  return model::load_llama_stage(*checkpoint, model, range, is_first, is_last);
}

}  // namespace

Result<std::unique_ptr<RankRuntime>> RankRuntime::create(const RankSettings& settings,
                                                         const Topology& topology,
                                                         comm::HostGroup& host,
                                                         comm::DeviceGroup& device) {
  const auto stage_index = static_cast<std::size_t>(host.rank());
  CHECK(topology.partition.stages.size() == static_cast<std::size_t>(host.size()),
        "a stage for each rank");
  const model::ModelConfig& model = topology.model;
  const coordinator::StageDevice& told = topology.devices[stage_index];
  const coordinator::StagePrediction& planned = topology.partition.stages[stage_index];

  std::unique_ptr<RankRuntime> rank(new RankRuntime());
  rank->model_ = model;
  rank->max_model_len_ = topology.max_model_len;
  rank->rank_ = host.rank();
  rank->host_name_ = settings.host_name;

  auto context = CpuContext::create({settings.n_threads, CpuIsa::kAvx512});
  if (!context.ok()) return context.status();
  rank->context_ = std::move(*context);

  const coordinator::LayerRange own = planned.layers;
  kvstore::KvStoreConfig store;
  store.shape = {model.n_kv_heads, model.head_dim, settings.kv_dtype, kernels::kKvPageTokens};
  store.n_layers = own.count;
  store.wide_positions = topology.max_model_len > 65536;
  store.wide_ids = model.vocab_size > 65536;
  store.keeps_token_ids = own.first == 0;
  LlamaStageConfig config;
  config.model = model;
  config.layers = {own.first, own.count};
  config.is_first = host.rank() == 0;
  config.is_last = host.rank() == host.size() - 1;
  config.max_batched_tokens = settings.max_num_batched_tokens;
  config.max_num_seqs = settings.max_num_seqs;
  config.max_model_len = topology.max_model_len;
  config.linear_math = settings.bf16_math ? kernels::LinearMath::kBF16 : kernels::LinearMath::kF32;
  config.token_table_bytes = settings.token_table_bytes;

  ComputeOptions options;
  options.stage = config;
  options.store = store;
  options.one_sequence_bytes =
      coordinator::one_sequence_bytes(settings, model::model_shape(model, settings.dummy_weights),
                                      topology.max_model_len, own.count);
  options.store.budget_bytes =
      settings.device == ComputeDevice::kCpu
          ? coordinator::cpu_pool_bytes(told, planned, options.one_sequence_bytes,
                                        settings.max_num_seqs, settings.available_memory_bytes,
                                        settings.ranks_on_host)
          : static_cast<std::uint64_t>(told.kv_bytes);
  if (!settings.device_memory_bytes.empty()) {
    options.device_memory_bytes = static_cast<std::uint64_t>(told.memory_bytes);
  }
  options.planned_bytes = static_cast<std::uint64_t>(planned.weight_bytes + told.workspace_bytes);
  options.load_weights = [&] {
    return load_weights(settings, model, config.layers, config.is_first, config.is_last);
  };
  options.local_rank = settings.local_rank;
  options.gpu_memory_utilization = settings.gpu_memory_utilization;
  options.startup_timeout = settings.startup_timeout;
  auto parts = settings.device == ComputeDevice::kCpu
                   ? make_cpu_parts(options, *rank->context_, device)
                   : make_cuda_parts(options, host, device);
  if (!parts.ok()) return parts.status();
  rank->parts_ = std::move(*parts);
  if (settings.wrap_stage) {
    rank->parts_.stage = settings.wrap_stage(std::move(rank->parts_.stage));
  }
  rank->worker_ =
      std::make_unique<StageWorker>(host, *rank->parts_.device_group, *rank->parts_.stage,
                                    *rank->parts_.store, *rank->context_, settings.worker);
  return rank;
}

control::StageInfo RankRuntime::info() const {
  const kvstore::KvStats kv = parts_.store->stats();
  control::StageInfo info;
  info.set_stage(rank_);
  info.set_host(host_name_);
  info.set_device(parts_.device);
  info.set_instruction_set(parts_.instruction_set);
  info.set_first_layer(parts_.stage->config().layers.first);
  info.set_n_layers(parts_.stage->config().layers.count);
  info.set_weight_bytes(parts_.stage->weight_bytes());
  info.set_kv_capacity_bytes(kv.capacity_bytes);
  info.set_kv_page_bytes(parts_.store->pool().page_bytes());
  info.set_has_token_table(parts_.store->has_token_table());
  return info;
}

}  // namespace spindle::worker
