#pragma once
// The weights that one pipeline stage of a Llama model needs, from a checkpoint or made up.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "worker/model/checkpoint.h"
#include "worker/model/host_tensor.h"
#include "worker/model/model_config.h"

namespace spindle::model {

// Layers [first, first + count).
struct LayerRange {
  int first = 0;
  int count = 0;
};

// Linear weights are [n_out, n_in], as in the file.
struct LlamaLayerWeights {
  HostTensor input_norm;           // [hidden]
  HostTensor q_proj;               // [n_heads * head_dim, hidden]
  HostTensor k_proj;               // [n_kv_heads * head_dim, hidden]
  HostTensor v_proj;               // [n_kv_heads * head_dim, hidden]
  HostTensor o_proj;               // [hidden, n_heads * head_dim]
  HostTensor post_attention_norm;  // [hidden]
  HostTensor gate_proj;            // [intermediate, hidden]
  HostTensor up_proj;              // [intermediate, hidden]
  HostTensor down_proj;            // [hidden, intermediate]
};

// Owns its tensors. When embeddings are tied and a stage has both ends of the model, `embedding`
// and `lm_head` are the same object, read once.
//
// Thread-safety: plain values; read-only after loading.
struct LlamaStageWeights {
  LayerRange range;
  std::vector<LlamaLayerWeights> layers;        // layers[i] is layer range.first + i
  std::shared_ptr<const HostTensor> embedding;  // [vocab, hidden], or null without embedding
  std::optional<HostTensor> final_norm;         // [hidden], or absent without head
  std::shared_ptr<const HostTensor> lm_head;    // [vocab, hidden], or null without head
};

struct TensorSpec {
  std::string name;
  std::vector<std::int64_t> shape;
};

// The tensors that a stage reads, each once. kInvalidArgument if the range is not within the model.
Result<std::vector<TensorSpec>> llama_stage_tensors(const ModelConfig& config, LayerRange range,
                                                    bool with_embedding, bool with_head);

// Reads a stage. Before any tensor is read, all of these are refused by name: a missing tensor, a
// tensor anywhere in the checkpoint that this model has no place for (a bias, a quantisation scale,
// a layer too many), a shape or element type that does not fit. Buffers of rotary frequencies, and
// an lm_head beside tied embeddings, have no effect and are ignored.
Result<LlamaStageWeights> load_llama_stage(const Checkpoint& checkpoint, const ModelConfig& config,
                                           LayerRange range, bool with_embedding, bool with_head);

// Random bf16 weights of the right shapes: norms are 1, all else is close to N(0, 0.02). A value
// depends only on (seed, tensor name, index), so it is the same however the model is split.
// kResourceExhausted when memory cannot be had.
Result<LlamaStageWeights> make_dummy_llama_stage(const ModelConfig& config, LayerRange range,
                                                 bool with_embedding, bool with_head,
                                                 std::uint64_t seed);

}  // namespace spindle::model
