#include "worker/model/model_shape.h"

namespace spindle::model {

coordinator::ModelShape model_shape(const ModelConfig& model, bool dummy_weights) {
  coordinator::ModelShape shape;
  shape.n_layers = model.n_layers;
  shape.hidden_size = model.hidden_size;
  shape.intermediate_size = model.intermediate_size;
  shape.n_heads = model.n_heads;
  shape.n_kv_heads = model.n_kv_heads;
  shape.head_dim = model.head_dim;
  shape.vocab_size = model.vocab_size;
  shape.max_position_embeddings = model.max_position_embeddings;
  shape.ties_embeddings = model.tie_word_embeddings;
  shape.has_f32_weights = !dummy_weights && model.torch_dtype == "float32";
  return shape;
}

}  // namespace spindle::model
