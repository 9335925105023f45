#include "worker/stage/token_table.h"

#include <algorithm>
#include <numeric>

#include "kernels/norm.h"

namespace spindle::worker {
namespace {

// Ids whose activations are held at a time.
constexpr std::int64_t kBatch = 256;

}  // namespace

TokenTable build_token_table(const CpuContext& context, const model::ModelConfig& model,
                             const kernels::EmbeddingTable& embedding,
                             std::span<const float> input_norm, const kernels::PackedLinear& qkv) {
  const std::int64_t q_width = std::int64_t{model.n_heads} * model.head_dim;
  const std::int64_t kv_width = std::int64_t{model.n_kv_heads} * model.head_dim;
  const std::int64_t width = q_width + 2 * kv_width;
  std::vector<float> hidden(static_cast<std::size_t>(kBatch * model.hidden_size));
  std::vector<float> projected(static_cast<std::size_t>(kBatch * width));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(kBatch));
  TokenTable table;
  table.k.reserve(static_cast<std::size_t>(model.vocab_size * kv_width));
  table.v.reserve(static_cast<std::size_t>(model.vocab_size * kv_width));
  for (std::int64_t first = 0; first < model.vocab_size; first += kBatch) {
    const std::int64_t n = std::min<std::int64_t>(kBatch, model.vocab_size - first);
    std::iota(ids.begin(), ids.begin() + n, static_cast<std::int32_t>(first));
    const Rows rows(hidden.data(), n, model.hidden_size);
    const Rows out(projected.data(), n, width);
    kernels::embedding(context, embedding, std::span(ids).first(static_cast<std::size_t>(n)), rows);
    kernels::rms_norm(context, rows, input_norm, model.rms_norm_eps, rows);
    kernels::linear(context, qkv, rows, out);
    for (std::int64_t i = 0; i < n; ++i) {
      const float* k = out.row(i) + q_width;
      for (std::int64_t j = 0; j < kv_width; ++j) {
        table.k.push_back(f32_to_f16(k[j]));
        table.v.push_back(f32_to_f16(k[kv_width + j]));
      }
    }
  }
  return table;
}

}  // namespace spindle::worker
