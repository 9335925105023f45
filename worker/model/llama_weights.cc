#include "worker/model/llama_weights.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <functional>
#include <string_view>
#include <utility>

#include "kernels/core/dtype.h"
#include "worker/model/printable.h"

namespace spindle::model {
namespace {

constexpr std::string_view kEmbedding = "model.embed_tokens.weight";
constexpr std::string_view kFinalNorm = "model.norm.weight";
constexpr std::string_view kHead = "lm_head.weight";
constexpr std::string_view kLayerPrefix = "model.layers.";
constexpr std::string_view kRotaryBuffer = "rotary_emb.inv_freq";

// What a dimension of a layer's tensor measures; kNone ends the shape of a vector.
enum class Dim { kNone, kHidden, kQuery, kKeyValue, kIntermediate };

struct LayerTensor {
  std::string_view suffix;
  HostTensor LlamaLayerWeights::*member;
  Dim rows;
  Dim columns;
};

constexpr std::array kLayerTensors = {
    LayerTensor{"input_layernorm.weight", &LlamaLayerWeights::input_norm, Dim::kHidden, Dim::kNone},
    LayerTensor{"self_attn.q_proj.weight", &LlamaLayerWeights::q_proj, Dim::kQuery, Dim::kHidden},
    LayerTensor{"self_attn.k_proj.weight", &LlamaLayerWeights::k_proj, Dim::kKeyValue,
                Dim::kHidden},
    LayerTensor{"self_attn.v_proj.weight", &LlamaLayerWeights::v_proj, Dim::kKeyValue,
                Dim::kHidden},
    LayerTensor{"self_attn.o_proj.weight", &LlamaLayerWeights::o_proj, Dim::kHidden, Dim::kQuery},
    LayerTensor{"post_attention_layernorm.weight", &LlamaLayerWeights::post_attention_norm,
                Dim::kHidden, Dim::kNone},
    LayerTensor{"mlp.gate_proj.weight", &LlamaLayerWeights::gate_proj, Dim::kIntermediate,
                Dim::kHidden},
    LayerTensor{"mlp.up_proj.weight", &LlamaLayerWeights::up_proj, Dim::kIntermediate,
                Dim::kHidden},
    LayerTensor{"mlp.down_proj.weight", &LlamaLayerWeights::down_proj, Dim::kHidden,
                Dim::kIntermediate},
};

std::int64_t dim_size(const ModelConfig& config, Dim dim) {
  switch (dim) {
    case Dim::kHidden:
      return config.hidden_size;
    case Dim::kQuery:
      return std::int64_t{config.n_heads} * config.head_dim;
    case Dim::kKeyValue:
      return std::int64_t{config.n_kv_heads} * config.head_dim;
    case Dim::kIntermediate:
      return config.intermediate_size;
    case Dim::kNone:
      break;
  }
  return 0;
}

TensorSpec layer_spec(const ModelConfig& config, int layer, const LayerTensor& tensor) {
  TensorSpec spec;
  spec.name = std::string(kLayerPrefix) + std::to_string(layer) + "." + std::string(tensor.suffix);
  spec.shape.push_back(dim_size(config, tensor.rows));
  if (tensor.columns != Dim::kNone) spec.shape.push_back(dim_size(config, tensor.columns));
  return spec;
}

TensorSpec vocabulary_spec(const ModelConfig& config, std::string_view name) {
  return {std::string(name), {config.vocab_size, config.hidden_size}};
}

TensorSpec final_norm_spec(const ModelConfig& config) {
  return {std::string(kFinalNorm), {config.hidden_size}};
}

std::string_view head_name(const ModelConfig& config) {
  return config.tie_word_embeddings ? kEmbedding : kHead;
}

Status check_range(const ModelConfig& config, LayerRange range) {
  if (range.first >= 0 && range.count >= 0 && range.first <= config.n_layers &&
      range.count <= config.n_layers - range.first) {
    return ok_status();
  }
  return invalid_argument("layers " + std::to_string(range.first) + " + " +
                          std::to_string(range.count) + " of a model with " +
                          std::to_string(config.n_layers));
}

// Builds a stage from any source of tensors; both kinds of stage share this one shape.
using TensorSource = std::function<Result<HostTensor>(const TensorSpec&)>;

Result<std::shared_ptr<const HostTensor>> shared_tensor(const TensorSource& source,
                                                        const TensorSpec& spec) {
  Result<HostTensor> tensor = source(spec);
  if (!tensor.ok()) return tensor.status();
  return std::shared_ptr<const HostTensor>(std::make_shared<HostTensor>(*std::move(tensor)));
}

Result<LlamaLayerWeights> build_layer(const ModelConfig& config, int layer,
                                      const TensorSource& source) {
  LlamaLayerWeights weights;
  for (const LayerTensor& tensor : kLayerTensors) {
    Result<HostTensor> loaded = source(layer_spec(config, layer, tensor));
    if (!loaded.ok()) return loaded.status();
    weights.*tensor.member = *std::move(loaded);
  }
  return weights;
}

Status build_ends(const ModelConfig& config, bool with_embedding, bool with_head,
                  const TensorSource& source, LlamaStageWeights& stage) {
  if (with_embedding) {
    auto embedding = shared_tensor(source, vocabulary_spec(config, kEmbedding));
    if (!embedding.ok()) return embedding.status();
    stage.embedding = *std::move(embedding);
  }
  if (!with_head) return ok_status();
  Result<HostTensor> norm = source(final_norm_spec(config));
  if (!norm.ok()) return norm.status();
  stage.final_norm = *std::move(norm);
  if (config.tie_word_embeddings && with_embedding) {
    stage.lm_head = stage.embedding;
    return ok_status();
  }
  auto head = shared_tensor(source, vocabulary_spec(config, head_name(config)));
  if (!head.ok()) return head.status();
  stage.lm_head = *std::move(head);
  return ok_status();
}

Result<LlamaStageWeights> build_stage(const ModelConfig& config, LayerRange range,
                                      bool with_embedding, bool with_head,
                                      const TensorSource& source) {
  LlamaStageWeights stage;
  stage.range = range;
  for (int i = 0; i < range.count; ++i) {
    Result<LlamaLayerWeights> layer = build_layer(config, range.first + i, source);
    if (!layer.ok()) return layer.status();
    stage.layers.push_back(*std::move(layer));
  }
  const Status status = build_ends(config, with_embedding, with_head, source, stage);
  if (!status.ok()) return status;
  return stage;
}

// "a", "b" and 7 more
std::string list_names(const std::vector<std::string>& names) {
  constexpr std::size_t kShown = 4;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kShown); ++i) {
    text += (i == 0 ? "" : ", ") + in_quotes(names[i]);
  }
  if (names.size() > kShown) text += " and " + std::to_string(names.size() - kShown) + " more";
  return text;
}

// ---- From a checkpoint ----

bool has_place(const ModelConfig& config, std::string_view name) {
  if (name.ends_with(kRotaryBuffer)) return true;
  if (name == kEmbedding || name == kFinalNorm || name == kHead) return true;
  if (!name.starts_with(kLayerPrefix)) return false;
  const std::string_view rest = name.substr(kLayerPrefix.size());
  int layer = -1;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), layer);
  if (error != std::errc() || layer < 0 || layer >= config.n_layers) return false;
  return std::any_of(kLayerTensors.begin(), kLayerTensors.end(), [&](const LayerTensor& tensor) {
    return name ==
           std::string(kLayerPrefix) + std::to_string(layer) + "." + std::string(tensor.suffix);
  });
}

Status refuse_extra(const ModelConfig& config, const std::vector<std::string>& names) {
  std::vector<std::string> extra;
  std::copy_if(names.begin(), names.end(), std::back_inserter(extra),
               [&](const std::string& name) { return !has_place(config, name); });
  if (extra.empty()) return ok_status();
  return unimplemented("the checkpoint holds tensors that this model has no place for: " +
                       list_names(extra));
}

Status refuse_missing(const Checkpoint& checkpoint, const std::vector<TensorSpec>& specs) {
  std::vector<std::string> missing;
  for (const TensorSpec& spec : specs) {
    if (!checkpoint.contains(spec.name)) missing.push_back(spec.name);
  }
  if (missing.empty()) return ok_status();
  return not_found("the checkpoint lacks " + list_names(missing));
}

Status check_tensor(const Checkpoint& checkpoint, const TensorSpec& spec) {
  const Result<TensorRef> tensor = checkpoint.find(spec.name);
  if (!tensor.ok()) return tensor.status();
  const TensorInfo& info = *tensor->info;
  if (info.shape != spec.shape) {
    return invalid_argument("tensor " + in_quotes(spec.name) + " has shape " +
                            shape_text(info.shape) + ", but config.json asks for " +
                            shape_text(spec.shape));
  }
  if (!weight_dtype(info.dtype)) {
    return unimplemented("tensor " + in_quotes(spec.name) + " is " +
                         std::string(file_dtype_name(info.dtype)) + "; supported: BF16, F16, F32");
  }
  return ok_status();
}

Result<HostTensor> read_tensor(const Checkpoint& checkpoint, const TensorSpec& spec) {
  const Result<TensorRef> ref = checkpoint.find(spec.name);
  if (!ref.ok()) return ref.status();
  // check_tensor has refused every other type.
  const DType dtype = weight_dtype(ref->info->dtype).value_or(DType::kF32);
  Result<HostTensor> tensor = make_host_tensor(dtype, spec.shape);
  if (!tensor.ok()) return tensor.status().with_context("tensor " + in_quotes(spec.name));
  const Status status = checkpoint.read_bytes(*ref, 0, tensor->data.bytes());
  if (!status.ok()) return status;
  return tensor;
}

// ---- Made up ----

// The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection that mixes all bits.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// FNV-1a.
std::uint64_t name_key(std::string_view name) {
  std::uint64_t key = 0xcbf29ce484222325u;
  for (const char c : name) key = (key ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return key;
}

// The sum of four 16-bit uniforms: close to normal, cheap, and the same on every machine.
float near_normal(std::uint64_t bits) {
  constexpr float kMean = 2.0f * 65535.0f;
  constexpr float kStandardDeviation = 37837.2275f;  // sqrt(4 (65536^2 - 1) / 12)
  const auto sum = static_cast<float>((bits & 0xffffu) + ((bits >> 16) & 0xffffu) +
                                      ((bits >> 32) & 0xffffu) + (bits >> 48));
  return (sum - kMean) / kStandardDeviation;
}

// Random weights are cut from one ring of numbers, each tensor from its own place: billions of them
// come at the speed of a copy. The ring's length is a prime, so that the rows of a matrix differ.
class DummyWeights {
 public:
  explicit DummyWeights(std::uint64_t seed) : seed_(mix(seed + kStep)), ring_(kRing) {
    for (std::size_t i = 0; i < kRing; ++i) {
      ring_[i] = f32_to_bf16(kScale * near_normal(mix(seed_ + (i + 1) * kStep)));
    }
  }

  Result<HostTensor> tensor(const TensorSpec& spec) const {
    Result<HostTensor> tensor = make_host_tensor(DType::kBF16, spec.shape);
    if (!tensor.ok()) return tensor.status().with_context("tensor " + in_quotes(spec.name));
    auto* out = reinterpret_cast<std::uint16_t*>(tensor->data.bytes().data());
    const auto n = static_cast<std::size_t>(tensor->n_elements());
    if (spec.shape.size() == 1) {  // a norm
      std::fill_n(out, n, f32_to_bf16(1.0f));
      return tensor;
    }
    std::size_t at = mix(seed_ ^ name_key(spec.name)) % kRing;
    for (std::size_t done = 0; done < n;) {
      const std::size_t count = std::min(n - done, kRing - at);
      std::copy_n(ring_.begin() + static_cast<std::ptrdiff_t>(at), count, out + done);
      done += count;
      at = 0;
    }
    return tensor;
  }

 private:
  static constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;
  static constexpr float kScale = 0.02f;
  static constexpr std::size_t kRing = 1048573;

  std::uint64_t seed_;
  std::vector<std::uint16_t> ring_;
};

}  // namespace

Result<std::vector<TensorSpec>> llama_stage_tensors(const ModelConfig& config, LayerRange range,
                                                    bool with_embedding, bool with_head) {
  const Status status = check_range(config, range);
  if (!status.ok()) return status;
  std::vector<TensorSpec> specs;
  for (int i = 0; i < range.count; ++i) {
    for (const LayerTensor& tensor : kLayerTensors) {
      specs.push_back(layer_spec(config, range.first + i, tensor));
    }
  }
  if (with_embedding) specs.push_back(vocabulary_spec(config, kEmbedding));
  if (with_head) {
    specs.push_back(final_norm_spec(config));
    if (!config.tie_word_embeddings || !with_embedding) {
      specs.push_back(vocabulary_spec(config, head_name(config)));
    }
  }
  return specs;
}

Result<LlamaStageWeights> load_llama_stage(const Checkpoint& checkpoint, const ModelConfig& config,
                                           LayerRange range, bool with_embedding, bool with_head) {
  const auto specs = llama_stage_tensors(config, range, with_embedding, with_head);
  if (!specs.ok()) return specs.status();
  Status status = refuse_extra(config, checkpoint.names());
  if (!status.ok()) return status;
  status = refuse_missing(checkpoint, *specs);
  if (!status.ok()) return status;
  for (const TensorSpec& spec : *specs) {
    status = check_tensor(checkpoint, spec);
    if (!status.ok()) return status;
  }
  // Only now are the shards open in which an index could have left a tensor unmentioned.
  status = refuse_extra(config, checkpoint.unlisted_names());
  if (!status.ok()) return status;
  return build_stage(config, range, with_embedding, with_head,
                     [&](const TensorSpec& spec) { return read_tensor(checkpoint, spec); });
}

Result<LlamaStageWeights> make_dummy_llama_stage(const ModelConfig& config, LayerRange range,
                                                 bool with_embedding, bool with_head,
                                                 std::uint64_t seed) {
  const Status status = check_range(config, range);
  if (!status.ok()) return status;
  const DummyWeights dummy(seed);
  return build_stage(config, range, with_embedding, with_head,
                     [&](const TensorSpec& spec) { return dummy.tensor(spec); });
}

}  // namespace spindle::model
