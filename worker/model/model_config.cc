#include "worker/model/model_config.h"

#include <algorithm>
#include <array>

#include "worker/model/json_fields.h"
#include "worker/model/printable.h"
#include "worker/model/regular_file.h"
#include "worker/model/rope_config.h"

namespace spindle::model {
namespace {

namespace json = boost::json;

constexpr std::string_view kFileName = "config.json";
constexpr std::uint64_t kMaxConfigBytes = 1 << 20;
constexpr std::string_view kArchitecture = "LlamaForCausalLM";

// The values with which a field has no effect on the result. JSON null always is one.
enum class Neutral { kNullOnly, kFalse, kTrue, kZero, kOne, kSilu, kEmpty, kFullAttention };

struct RefusedField {
  std::string_view name;
  Neutral neutral;
};

// Fields that change what the model computes unless they hold their neutral value.
constexpr std::array kRefusedFields = {
    RefusedField{"add_cross_attention", Neutral::kFalse},
    RefusedField{"alibi", Neutral::kFalse},
    RefusedField{"attention_bias", Neutral::kFalse},
    RefusedField{"attention_chunk_size", Neutral::kNullOnly},
    RefusedField{"attention_multiplier", Neutral::kNullOnly},
    RefusedField{"attn_logit_softcapping", Neutral::kNullOnly},
    RefusedField{"bias", Neutral::kFalse},
    RefusedField{"clip_qkv", Neutral::kNullOnly},
    RefusedField{"compression_config", Neutral::kNullOnly},
    RefusedField{"cross_attention_hidden_size", Neutral::kNullOnly},
    RefusedField{"embedding_multiplier", Neutral::kOne},
    RefusedField{"final_logit_softcapping", Neutral::kNullOnly},
    RefusedField{"hidden_act", Neutral::kSilu},
    RefusedField{"hidden_activation", Neutral::kSilu},
    RefusedField{"is_causal", Neutral::kTrue},
    RefusedField{"is_encoder_decoder", Neutral::kFalse},
    RefusedField{"layer_types", Neutral::kFullAttention},
    RefusedField{"logit_scale", Neutral::kOne},
    RefusedField{"logits_scaling", Neutral::kOne},
    RefusedField{"mlp_bias", Neutral::kFalse},
    RefusedField{"no_rope_layers", Neutral::kEmpty},
    RefusedField{"num_experts", Neutral::kZero},
    RefusedField{"num_local_experts", Neutral::kZero},
    RefusedField{"partial_rotary_factor", Neutral::kOne},
    RefusedField{"pretraining_tp", Neutral::kOne},
    RefusedField{"pruned_heads", Neutral::kEmpty},
    RefusedField{"qkv_bias", Neutral::kFalse},
    RefusedField{"quantization_config", Neutral::kNullOnly},
    RefusedField{"query_pre_attn_scalar", Neutral::kNullOnly},
    RefusedField{"residual_multiplier", Neutral::kOne},
    RefusedField{"rope_interleaved", Neutral::kFalse},
    RefusedField{"sliding_window", Neutral::kNullOnly},
    RefusedField{"use_bias", Neutral::kFalse},
    RefusedField{"use_qk_norm", Neutral::kFalse},
    RefusedField{"use_sliding_window", Neutral::kFalse},
};

// Fields read elsewhere in this file.
constexpr std::array<std::string_view, 19> kUsedFields = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "vocab_size",
};

// Fields with no effect on the forward pass at inference: bookkeeping, training, output format, and
// generation settings, which come from generation_config.json.
constexpr std::array<std::string_view, 60> kHarmlessFields = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
};

bool is_empty(const json::value& value) {
  return (value.is_array() && value.get_array().empty()) ||
         (value.is_object() && value.get_object().empty());
}

bool is_full_attention(const json::value& value) {
  return value.is_array() &&
         std::all_of(value.get_array().begin(), value.get_array().end(), [](const json::value& v) {
           return v.is_string() && v.get_string() == "full_attention";
         });
}

bool is_neutral(const json::value& value, Neutral neutral) {
  switch (neutral) {
    case Neutral::kNullOnly:
      return false;
    case Neutral::kFalse:
      return value.is_bool() && !value.get_bool();
    case Neutral::kTrue:
      return value.is_bool() && value.get_bool();
    case Neutral::kZero:
      return is_number(value, 0);
    case Neutral::kOne:
      return is_number(value, 1);
    case Neutral::kSilu:
      return value.is_string() && value.get_string() == "silu";
    case Neutral::kEmpty:
      return is_empty(value);
    case Neutral::kFullAttention:
      return is_full_attention(value);
  }
  return false;
}

std::string_view neutral_name(Neutral neutral) {
  switch (neutral) {
    case Neutral::kNullOnly:
      return "null";
    case Neutral::kFalse:
      return "false";
    case Neutral::kTrue:
      return "true";
    case Neutral::kZero:
      return "0";
    case Neutral::kOne:
      return "1";
    case Neutral::kSilu:
      return "\"silu\"";
    case Neutral::kEmpty:
      return "an empty list";
    case Neutral::kFullAttention:
      return "a list of \"full_attention\"";
  }
  return "?";
}

void check_architecture(const json::object& object, FieldReader& fields, ModelConfig& config) {
  const json::value* names = fields.find("architectures");
  if (names == nullptr) {
    return fields.fail(invalid_argument("\"architectures\" is missing"));
  }
  const bool known = names->is_array() && names->get_array().size() == 1 &&
                     names->get_array()[0].is_string() &&
                     names->get_array()[0].get_string() == json::string_view(kArchitecture);
  if (!known) {
    return fields.fail(refuse_value("\"architectures\"", *names, "[\"LlamaForCausalLM\"]"));
  }
  const json::value* type = fields.find("model_type");
  if (type != nullptr && !(type->is_string() && type->get_string() == "llama")) {
    return fields.fail(refuse_value("\"model_type\"", *type, "\"llama\""));
  }
  for (const RefusedField& refused : kRefusedFields) {
    const json::value* value = object.if_contains(refused.name);
    if (value != nullptr && !value->is_null() && !is_neutral(*value, refused.neutral)) {
      fields.fail(refuse_value(in_quotes(refused.name), *value, neutral_name(refused.neutral)));
    }
  }
  config.architecture = kArchitecture;
}

void read_sizes(FieldReader& fields, ModelConfig& config) {
  const auto size = [&](std::string_view name, int max) {
    return static_cast<int>(fields.required_integer(name, 1, max));
  };
  config.n_layers = size("num_hidden_layers", kMaxLayers);
  config.hidden_size = size("hidden_size", kMaxHiddenSize);
  config.intermediate_size = size("intermediate_size", kMaxIntermediateSize);
  config.n_heads = size("num_attention_heads", kMaxHeads);
  config.vocab_size = size("vocab_size", kMaxVocabSize);
  config.n_kv_heads = static_cast<int>(
      fields.integer("num_key_value_heads", 1, kMaxHeads).value_or(config.n_heads));
  if (config.n_heads % config.n_kv_heads != 0) {
    fields.fail(invalid_argument("\"num_attention_heads\" (" + std::to_string(config.n_heads) +
                                 ") is not a multiple of \"num_key_value_heads\" (" +
                                 std::to_string(config.n_kv_heads) + ")"));
  }
  const auto head_dim = fields.integer("head_dim", 2, kMaxHeadDim);
  if (!head_dim && config.hidden_size % config.n_heads != 0) {
    fields.fail(invalid_argument("\"hidden_size\" (" + std::to_string(config.hidden_size) +
                                 ") is not a multiple of \"num_attention_heads\" (" +
                                 std::to_string(config.n_heads) + ") and \"head_dim\" is missing"));
  }
  config.head_dim = static_cast<int>(head_dim.value_or(config.hidden_size / config.n_heads));
  if (config.head_dim % 2 != 0 || config.head_dim < 2 || config.head_dim > kMaxHeadDim) {
    fields.fail(invalid_argument("\"head_dim\" must be even and in [2, " +
                                 std::to_string(kMaxHeadDim) + "], got " +
                                 std::to_string(config.head_dim)));
  }
  config.max_position_embeddings =
      fields.integer("max_position_embeddings", 1, kMaxPositions).value_or(2048);
  config.rms_norm_eps = fields.number("rms_norm_eps", {0, 0.1, true}).value_or(1e-6f);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings").value_or(false);
}

void read_dtype(FieldReader& fields, ModelConfig& config) {
  // "dtype" is the newer name of "torch_dtype".
  const std::string_view name = fields.find("dtype") != nullptr ? "dtype" : "torch_dtype";
  const auto dtype = fields.string(name);
  if (!dtype) return;
  if (*dtype != "bfloat16" && *dtype != "float16" && *dtype != "float32") {
    fields.fail(refuse_value(fields.name_of(name), *fields.find(name),
                             "\"bfloat16\", \"float16\", \"float32\""));
  }
  config.torch_dtype = *dtype;
}

void read_tokens(const json::object& object, FieldReader& fields, ModelConfig& config) {
  config.eos_token_ids =
      fields.token_ids("eos_token_id", config.vocab_size).value_or(std::vector<std::int32_t>{});
  // LlamaConfig fills absent ids with 1 and 2; an explicit null means none.
  if (!object.contains("eos_token_id") && config.vocab_size > 2) config.eos_token_ids = {2};
  const auto bos = fields.integer("bos_token_id", 0, config.vocab_size - 1);
  if (bos) config.bos_token_id = static_cast<std::int32_t>(*bos);
  if (!object.contains("bos_token_id") && config.vocab_size > 1) config.bos_token_id = 1;
}

template <std::size_t N>
bool contains(const std::array<std::string_view, N>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

void collect_unknown(const json::object& object, ModelConfig& config) {
  for (const auto& field : object) {
    const std::string_view name(field.key().data(), field.key().size());
    const bool refused =
        std::any_of(kRefusedFields.begin(), kRefusedFields.end(),
                    [&](const RefusedField& candidate) { return candidate.name == name; });
    if (!refused && !contains(kUsedFields, name) && !contains(kHarmlessFields, name)) {
      add_unknown_field(config, std::string(name));
    }
  }
}

Result<ModelConfig> read_config(const json::object& object) {
  ModelConfig config;
  FieldReader fields(object);
  check_architecture(object, fields, config);
  if (!fields.status().ok()) return fields.status();
  read_sizes(fields, config);
  if (!fields.status().ok()) return fields.status();
  read_dtype(fields, config);
  read_tokens(object, fields, config);
  read_rope(fields, config);
  if (!fields.status().ok()) return fields.status();
  const Result<std::int64_t> weights = count_weights(config);
  if (!weights.ok()) return weights.status();
  collect_unknown(object, config);
  return config;
}

// a * b + c, or nullopt on overflow.
std::optional<std::int64_t> multiply_add(std::int64_t a, std::int64_t b, std::int64_t c) {
  std::int64_t product = 0;
  std::int64_t sum = 0;
  if (__builtin_mul_overflow(a, b, &product) || __builtin_add_overflow(product, c, &sum)) {
    return std::nullopt;
  }
  return sum;
}

}  // namespace

Result<ModelConfig> parse_model_config(std::string_view json_text) {
  if (json_text.size() > kMaxConfigBytes) {
    return too_large("config.json: " + std::to_string(json_text.size()) + " bytes, at most " +
                     std::to_string(kMaxConfigBytes) + " are allowed");
  }
  const Result<json::object> object = parse_json_object(json_text, kFileName);
  if (!object.ok()) return object.status();
  Result<ModelConfig> config = read_config(*object);
  if (!config.ok()) return config.status().with_context(kFileName);
  return config;
}

Result<ModelConfig> load_model_config(const std::filesystem::path& model_dir) {
  const Result<std::string> text = read_text_file(model_dir / kFileName, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  return parse_model_config(*text);
}

Result<std::int64_t> count_weights(const ModelConfig& config) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t query = std::int64_t{config.n_heads} * config.head_dim;
  const std::int64_t kv = std::int64_t{config.n_kv_heads} * config.head_dim;
  const std::int64_t columns = 2 * query + 2 * kv + 3 * std::int64_t{config.intermediate_size} + 2;
  const auto per_layer = multiply_add(hidden, columns, 0);
  const auto ends = multiply_add(
      hidden, std::int64_t{config.vocab_size} * (config.tie_word_embeddings ? 1 : 2) + 1, 0);
  const auto total =
      per_layer && ends ? multiply_add(*per_layer, config.n_layers, *ends) : std::nullopt;
  if (!total) return invalid_argument("the number of weights overflows 64 bits");
  return *total;
}

}  // namespace spindle::model
