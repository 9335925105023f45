#include "worker/daemon/rank_runtime.h"

#include <utility>

#include "kernels/attention.h"
#include "worker/daemon/host_resources.h"
#include "worker/model/checkpoint.h"
#include "worker/model/llama_weights.h"

namespace spindle::worker {
namespace {

// Fixed, so that every rank and every run makes the same dummy model.
constexpr std::uint64_t kDummySeed = 0x5d1e;

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

// The KV pool's size: as told, or enough for max_num_seqs; refused when one request of full length
// would not fit.
Result<std::uint64_t> resolve_kv_bytes(const RankSettings& settings,
                                       const kvstore::KvStoreConfig& store,
                                       std::int64_t max_model_len) {
  const std::uint64_t one_sequence =
      static_cast<std::uint64_t>(kvstore::stage_pages(store.shape, store.n_layers, max_model_len)) *
      store.shape.page_bytes();
  const std::uint64_t bytes =
      settings.kv_bytes > 0
          ? settings.kv_bytes
          : default_kv_bytes(one_sequence * static_cast<std::uint64_t>(settings.max_num_seqs),
                             settings.available_memory_bytes, settings.ranks_on_host);
  if (bytes < one_sequence) {
    return invalid_argument("one sequence of max_model_len " + std::to_string(max_model_len) +
                            " takes " + std::to_string(one_sequence) +
                            " bytes of KV on this stage, the pool has " + std::to_string(bytes) +
                            "; raise kv.memory_bytes or lower model.max_model_len");
  }
  return bytes;
}

}  // namespace

Result<std::vector<coordinator::LayerRange>> plan_layers(const model::ModelConfig& model,
                                                         int n_stages,
                                                         const std::vector<int>& layers_per_stage) {
  if (!layers_per_stage.empty()) {
    return coordinator::partition_as_told(model.n_layers, n_stages, layers_per_stage);
  }
  const double hidden = model.hidden_size;
  const double head_dim = model.head_dim;
  coordinator::PartitionCosts costs;
  costs.layer = hidden * head_dim * (2.0 * model.n_heads + 2.0 * model.n_kv_heads) +
                3.0 * hidden * model.intermediate_size;
  costs.head = hidden * model.vocab_size;
  return coordinator::partition_layers(model.n_layers, n_stages, costs);
}

Result<std::unique_ptr<RankRuntime>> RankRuntime::create(const RankSettings& settings,
                                                         comm::HostGroup& host,
                                                         comm::DeviceGroup& device) {
  auto model = model::load_model_config(settings.model_dir);
  if (!model.ok()) return model.status();
  auto ranges = plan_layers(*model, host.size(), settings.layers_per_stage);
  if (!ranges.ok()) return ranges.status();
  auto max_model_len = resolve_max_model_len(settings, *model);
  if (!max_model_len.ok()) return max_model_len.status();

  std::unique_ptr<RankRuntime> rank(new RankRuntime());
  rank->model_ = *model;
  rank->max_model_len_ = *max_model_len;
  rank->rank_ = host.rank();
  rank->host_name_ = settings.host_name;

  auto context = CpuContext::create({settings.n_threads, CpuIsa::kAvx512});
  if (!context.ok()) return context.status();
  rank->context_ = std::move(*context);

  const coordinator::LayerRange own = (*ranges)[static_cast<std::size_t>(host.rank())];
  kvstore::KvStoreConfig store;
  store.shape = {model->n_kv_heads, model->head_dim, settings.kv_dtype, kernels::kKvPageTokens};
  store.n_layers = own.count;
  store.wide_positions = *max_model_len > 65536;
  store.wide_ids = model->vocab_size > 65536;
  store.keeps_token_ids = own.first == 0;
  auto kv_bytes = resolve_kv_bytes(settings, store, *max_model_len);
  if (!kv_bytes.ok()) return kv_bytes.status();
  store.budget_bytes = *kv_bytes;
  auto created_store = kvstore::KvStore::create(store);
  if (!created_store.ok()) return created_store.status();
  rank->store_ = std::move(*created_store);

  LlamaStageConfig config;
  config.model = *model;
  config.layers = {own.first, own.count};
  config.is_first = host.rank() == 0;
  config.is_last = host.rank() == host.size() - 1;
  config.max_batched_tokens = settings.max_num_batched_tokens;
  config.max_num_seqs = settings.max_num_seqs;
  config.max_model_len = *max_model_len;
  config.linear_math = settings.linear_math;
  config.token_table_bytes = settings.token_table_bytes;
  auto weights = load_weights(settings, *model, config.layers, config.is_first, config.is_last);
  if (!weights.ok()) return weights.status();
  auto stage = LlamaStage::create(config, std::move(*weights), *rank->context_, *rank->store_);
  if (!stage.ok()) return stage.status();
  rank->stage_ = std::move(*stage);
  rank->worker_ = std::make_unique<StageWorker>(host, device, *rank->stage_, *rank->store_,
                                                *rank->context_, settings.worker);
  return rank;
}

control::StageInfo RankRuntime::info() const {
  const kvstore::KvStats kv = store_->stats();
  control::StageInfo info;
  info.set_stage(rank_);
  info.set_host(host_name_);
  info.set_device("cpu (" + std::string(cpu_isa_name(context_->isa())) + ", " +
                  std::to_string(context_->n_threads()) + " threads)");
  info.set_instruction_set(std::string(cpu_isa_name(context_->isa())));
  info.set_first_layer(stage_->config().layers.first);
  info.set_n_layers(stage_->config().layers.count);
  info.set_weight_bytes(stage_->weight_bytes());
  info.set_kv_capacity_bytes(kv.capacity_bytes);
  info.set_kv_page_bytes(store_->pool().page_bytes());
  info.set_has_token_table(store_->has_token_table());
  return info;
}

}  // namespace spindle::worker
