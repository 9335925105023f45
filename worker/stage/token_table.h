#pragma once
// Layer 0's K before RoPE and V are functions of the token id alone. This table holds them for the
// whole vocabulary, so that a cached token of layer 0 is its id.

#include <cstdint>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/embedding.h"
#include "kernels/linear.h"
#include "kvstore/plan/kv_shape.h"
#include "worker/model/model_config.h"

namespace spindle::worker {

// Immutable once built. Thread-safety: a plain value.
struct TokenTable {
  std::vector<std::uint16_t> k;  // f16 [vocab, n_kv_heads, head_dim]
  std::vector<std::uint16_t> v;

  static std::uint64_t bytes_for(const model::ModelConfig& model) {
    return kvstore::token_table_bytes(model.vocab_size, model.n_kv_heads, model.head_dim);
  }
};

// `qkv` is layer 0's fused projection [(n_heads + 2 n_kv_heads) * head_dim, hidden].
TokenTable build_token_table(const CpuContext& context, const model::ModelConfig& model,
                             const kernels::EmbeddingTable& embedding,
                             std::span<const float> input_norm, const kernels::PackedLinear& qkv);

}  // namespace spindle::worker
