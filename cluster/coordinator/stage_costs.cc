#include "worker/daemon/stage_costs.h"

#include <algorithm>

#include "kernels/attention.h"
#include "kvstore/plan/kv_shape.h"
#include "worker/stage/token_table.h"

namespace spindle::worker {
namespace {

constexpr std::int64_t kNormBytes = 4;  // of an element, on every device

// Bytes of a weight in the checkpoint, and in the matrices as a stage holds and reads them.
struct WeightBytes {
  std::int64_t file = 2;
  std::int64_t held = 2;
  std::int64_t read = 2;
};

WeightBytes weight_bytes(const RankSettings& settings, const model::ModelConfig& model) {
  WeightBytes bytes;
  if (!settings.dummy_weights && model.torch_dtype == "float32") bytes.file = 4;
  if (settings.device == ComputeDevice::kCuda) return bytes;
  if (settings.linear_math == kernels::LinearMath::kF32) {
    bytes.held = bytes.file;
    bytes.read = bytes.file;
  } else {
    bytes.held = 4;  // for single rows and for oneDNN
  }
  return bytes;
}

struct Widths {
  std::int64_t q;
  std::int64_t kv;
};

// Activations of a step, by LlamaStage's and CudaStage's arrays, and the tables of RoPE.
std::int64_t workspace_bytes(const RankSettings& settings, const model::ModelConfig& model,
                             std::int64_t max_model_len, Widths width, bool is_last) {
  const std::int64_t hidden = model.hidden_size;
  const std::int64_t inter = model.intermediate_size;
  const std::int64_t n_logits = is_last ? settings.max_num_seqs : 0;
  const std::int64_t rope = max_model_len * model.head_dim * 4;
  if (settings.device == ComputeDevice::kCpu) {
    const std::int64_t row = 4 * (3 * hidden + 2 * width.q + 2 * width.kv + 3 * inter);
    return settings.max_num_batched_tokens * row + n_logits * 4 * model.vocab_size + rope;
  }
  const std::int64_t row = 6 * hidden + 8 * width.q + 8 * width.kv + 10 * inter;
  // Compressed blocks of a prefill, expanded a layer at a time.
  const std::int64_t expanded = max_model_len * width.kv * 4;
  return settings.max_num_batched_tokens * row + n_logits * (6 * hidden + 4 * model.vocab_size) +
         rope + expanded;
}

std::int64_t in_pages(std::int64_t n_tokens) {
  return kvstore::pages_for_tokens(n_tokens, kernels::kKvPageTokens) * kernels::kKvPageTokens;
}

}  // namespace

coordinator::PartitionProblem stage_costs(const RankSettings& settings,
                                          const model::ModelConfig& model,
                                          std::int64_t max_model_len, int n_stages) {
  const bool on_gpu = settings.device == ComputeDevice::kCuda;
  const std::int64_t hidden = model.hidden_size;
  const Widths width = {std::int64_t{model.n_heads} * model.head_dim,
                        std::int64_t{model.n_kv_heads} * model.head_dim};
  const WeightBytes bytes = weight_bytes(settings, model);
  const std::int64_t layer_weights =
      hidden * (2 * width.q + 2 * width.kv) + 3 * hidden * model.intermediate_size;
  const std::int64_t table_weights = hidden * model.vocab_size;

  coordinator::PartitionProblem problem;
  coordinator::PartCost layer;
  layer.kv_bytes_per_token =
      2 * width.kv * static_cast<std::int64_t>(dtype_bytes(settings.kv_dtype));
  layer.weight_bytes = layer_weights * bytes.held + 2 * hidden * kNormBytes;
  const std::int64_t n_sequences =
      on_gpu ? std::min(kTypicalGpuSequences, settings.max_num_seqs) : 1;
  layer.time = static_cast<double>(layer_weights * bytes.read +
                                   n_sequences * std::min(kTypicalContext, max_model_len) *
                                       layer.kv_bytes_per_token);
  problem.layers.assign(static_cast<std::size_t>(model.n_layers), layer);

  problem.head.time = static_cast<double>(table_weights * bytes.read);
  problem.head.weight_bytes = table_weights * bytes.held + hidden * kNormBytes;
  // A few rows are read.
  const bool is_shared = on_gpu && n_stages == 1 && model.tie_word_embeddings && bytes.file == 2;
  problem.embedding.weight_bytes = is_shared ? 0 : table_weights * bytes.file;
  if (TokenTable::bytes_for(model) <= settings.token_table_bytes) {
    problem.embedding.weight_bytes += static_cast<std::int64_t>(TokenTable::bytes_for(model));
  }

  problem.devices.resize(static_cast<std::size_t>(n_stages));
  for (int stage = 0; stage < n_stages; ++stage) {
    problem.devices[static_cast<std::size_t>(stage)].workspace_bytes =
        workspace_bytes(settings, model, max_model_len, width, stage + 1 == n_stages);
  }
  problem.min_kv_tokens = in_pages(max_model_len);
  problem.max_kv_tokens = problem.min_kv_tokens * settings.max_num_seqs;
  return problem;
}

}  // namespace spindle::worker
