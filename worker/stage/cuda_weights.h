#pragma once
// The weights of one stage on a device.

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/core/cuda_context.h"
#include "kernels/core/dtype.h"
#include "kernels/embedding.h"
#include "kernels/linear.h"
#include "kernels/rope.h"
#include "worker/model/llama_weights.h"
#include "worker/stage/stage.h"

namespace spindle::worker {

struct CudaLayer {
  DeviceBuffer input_norm;           // f32 [hidden]
  DeviceBuffer post_attention_norm;  // f32 [hidden]
  kernels::DeviceLinear qkv;         // [(n_heads + 2 n_kv_heads) * head_dim, hidden]
  kernels::DeviceLinear output;      // [hidden, n_heads * head_dim]
  kernels::DeviceLinear gate_up;     // [2 * intermediate, hidden]
  kernels::DeviceLinear down;        // [hidden, intermediate]
};

// Move-only; the context outlives it. Thread-safety: read-only once built.
struct CudaWeights {
  std::vector<CudaLayer> layers;
  kernels::EmbeddingTable embedding;  // first stage; device memory of embedding_rows or lm_head
  DeviceBuffer embedding_rows;
  DeviceBuffer final_norm;  // last stage, f32 [hidden]
  std::unique_ptr<kernels::DeviceLinear> lm_head;
  kernels::DeviceRope rope;
  DeviceBuffer rope_cos;  // f32 [max_model_len, head_dim / 2]
  DeviceBuffer rope_sin;
  // Layer 0's K before RoPE and V of every token id, f16 [vocab, n_kv_heads, head_dim]; empty when
  // the stage has no layer 0 or they would be larger than token_table_bytes.
  DeviceBuffer token_k;
  DeviceBuffer token_v;
  std::uint64_t n_bytes = 0;

  // Copies the stage's tensors, one layer's at a time, rounds products' weights to bf16, times the
  // products' algorithms once per shape and builds layer 0's table. RESOURCE_EXHAUSTED, naming the
  // tensor, when the device has no room.
  static Result<CudaWeights> upload(const CudaContext& context, const LlamaStageConfig& config,
                                    model::LlamaStageWeights weights);
};

}  // namespace spindle::worker
