#include "cluster/coordinator/stage_costs.h"

#include <algorithm>

#include "kvstore/plan/kv_shape.h"

namespace spindle::coordinator {
namespace {

constexpr std::int64_t kNormBytes = 4;  // of an element, on every device

// For gpu_scratch_bytes.
constexpr std::int64_t kCodebookTileTokens = 1024;
constexpr std::int64_t kCodebookMatchBytes = 192 << 10;  // of a tile
constexpr std::int64_t kUploadBytes = 5 << 20;           // tables and copies
constexpr std::int64_t kScoreSlots = 2;
constexpr std::int64_t kQuerySlots = 8;

// Bytes of a weight in the checkpoint, and in the matrices as a stage holds and reads them.
struct WeightBytes {
  std::int64_t file = 2;
  std::int64_t held = 2;
  std::int64_t read = 2;
};

WeightBytes weight_bytes(const ClusterSettings& settings, const ModelShape& model) {
  WeightBytes bytes;
  if (model.has_f32_weights) bytes.file = 4;
  if (settings.device == ComputeDevice::kCuda) return bytes;
  if (!settings.bf16_math) {
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
std::int64_t workspace_bytes(const ClusterSettings& settings, const ModelShape& model,
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
  constexpr int kPageTokens = kvstore::KvShape{}.page_tokens;
  return kvstore::pages_for_tokens(n_tokens, kPageTokens) * kPageTokens;
}

std::int64_t token_table_bytes(const ModelShape& model) {
  return static_cast<std::int64_t>(
      kvstore::token_table_bytes(model.vocab_size, model.n_kv_heads, model.head_dim));
}

}  // namespace

PartitionProblem stage_costs(const ClusterSettings& settings, const ModelShape& model,
                             std::int64_t max_model_len, int n_stages) {
  const bool on_gpu = settings.device == ComputeDevice::kCuda;
  const std::int64_t hidden = model.hidden_size;
  const Widths width = {std::int64_t{model.n_heads} * model.head_dim,
                        std::int64_t{model.n_kv_heads} * model.head_dim};
  const WeightBytes bytes = weight_bytes(settings, model);
  const std::int64_t layer_weights =
      hidden * (2 * width.q + 2 * width.kv) + 3 * hidden * model.intermediate_size;
  const std::int64_t table_weights = hidden * model.vocab_size;

  PartitionProblem problem;
  PartCost layer;
  layer.kv_bytes_per_token =
      2 * width.kv * static_cast<std::int64_t>(dtype_bytes(settings.kv_dtype));
  layer.weight_bytes = layer_weights * bytes.held + 2 * hidden * kNormBytes;
  const std::int64_t n_sequences =
      on_gpu ? (std::int64_t{settings.max_num_seqs} + n_stages - 1) / n_stages : 1;
  layer.time = static_cast<double>(layer_weights * bytes.read +
                                   n_sequences * std::min(kTypicalContext, max_model_len) *
                                       layer.kv_bytes_per_token);
  problem.layers.assign(static_cast<std::size_t>(model.n_layers), layer);

  problem.head.time = static_cast<double>(table_weights * bytes.read);
  problem.head.weight_bytes = table_weights * bytes.held + hidden * kNormBytes;
  // A few rows are read.
  const bool is_shared = on_gpu && n_stages == 1 && model.ties_embeddings && bytes.file == 2;
  problem.embedding.weight_bytes = is_shared ? 0 : table_weights * bytes.file;
  if (has_token_table(settings, model)) problem.embedding.weight_bytes += token_table_bytes(model);

  problem.devices.resize(static_cast<std::size_t>(n_stages));
  for (int stage = 0; stage < n_stages; ++stage) {
    problem.devices[static_cast<std::size_t>(stage)].workspace_bytes =
        workspace_bytes(settings, model, max_model_len, width, stage + 1 == n_stages);
  }
  problem.min_kv_tokens = in_pages(max_model_len);
  problem.max_kv_tokens = problem.min_kv_tokens * settings.max_num_seqs;
  return problem;
}

bool has_token_table(const ClusterSettings& settings, const ModelShape& model) {
  return static_cast<std::uint64_t>(token_table_bytes(model)) <= settings.token_table_bytes;
}

std::int64_t gpu_scratch_bytes(const ModelShape& model, std::int64_t max_model_len, int n_layers) {
  constexpr std::int64_t kElement = 2;  // KV and queries on a GPU
  constexpr std::int64_t kBlock = kernels::kKvBlockTokens;
  const std::int64_t heads = model.n_kv_heads;
  const std::int64_t dim = model.head_dim;
  // Compression of a layer: rows, pieces, references, entries, codebook_match, uploads.
  const std::int64_t tokens = heads * max_model_len;
  const std::int64_t blocks = tokens / kBlock + 2 * heads;
  const std::int64_t entries =
      std::min(kvstore::kMaxTokenEntries, max_model_len + kCodebookTileTokens);
  std::int64_t bytes = 3 * tokens * dim * kElement;
  bytes += 2 * blocks * (kBlock * dim * kElement + 512) + 4 * blocks * 64;
  bytes += 2 * heads *
           ((entries + kernels::kCodebookChunkEntries) * dim * kElement + kCodebookMatchBytes);
  bytes += 4 * tokens + blocks * 336 + kUploadBytes;
  // Scores of a boundary: one layer's, those that wait, W_O in tiles, and the window's queries.
  const std::int64_t query_heads = model.n_heads;
  const std::int64_t probabilities =
      std::max(query_heads * kvstore::kObservationWindow, n_layers * heads);
  bytes +=
      4 * max_model_len * (probabilities + query_heads + heads + kScoreSlots * n_layers * heads);
  bytes += kElement * query_heads * dim * model.hidden_size;
  bytes += kElement * kQuerySlots * n_layers * kvstore::kObservationWindow * query_heads * dim;
  return bytes;
}

}  // namespace spindle::coordinator
