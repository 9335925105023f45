#pragma once
// The architecture of a model, read from the config.json of a Hugging Face folder.
//
// Only LlamaForCausalLM is understood. A field that would change the result in a way this code does
// not compute is refused by name and value (kUnimplemented); a field of a wrong type or out of
// range is kInvalidArgument. Missing fields take the defaults of the reference implementation's
// LlamaConfig where it has safe ones; the sizes must be given.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::model {

// Rotary embedding. Fields that the scaling does not use keep their defaults.
struct RopeConfig {
  enum class Scaling : std::uint8_t { kNone, kLinear, kLlama3 };

  float theta = 10000.0f;
  Scaling scaling = Scaling::kNone;
  float factor = 1.0f;
  float low_freq_factor = 1.0f;
  float high_freq_factor = 4.0f;
  std::int64_t original_max_position_embeddings = 0;

  bool operator==(const RopeConfig&) const = default;
};

// Plain values. Invariants of a parsed one: every size is in its range below, n_heads is a multiple
// of n_kv_heads, head_dim is even, token ids are in [0, vocab_size), the number of weights fits
// int64.
//
// Thread-safety: plain values.
struct ModelConfig {
  std::string architecture;
  int n_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;  // n_heads * head_dim need not equal hidden_size
  int vocab_size = 0;
  std::int64_t max_position_embeddings = 0;
  float rms_norm_eps = 0;
  bool tie_word_embeddings = false;
  RopeConfig rope;
  std::vector<std::int32_t> eos_token_ids;
  std::optional<std::int32_t> bos_token_id;
  std::string torch_dtype;  // "bfloat16", "float16", "float32" or "" when not given

  // Fields neither used, refused nor known to be harmless, for the caller to log. Printable text.
  std::vector<std::string> unknown_fields;
};

inline constexpr int kMaxLayers = 1024;
inline constexpr int kMaxHiddenSize = 65536;
inline constexpr int kMaxIntermediateSize = 1 << 20;
inline constexpr int kMaxHeads = 4096;
inline constexpr int kMaxHeadDim = 1024;
inline constexpr int kMaxVocabSize = 4 << 20;
inline constexpr std::int64_t kMaxPositions = std::int64_t{1} << 30;

Result<ModelConfig> parse_model_config(std::string_view json);
// Reads `model_dir`/config.json (at most 1 MiB).
Result<ModelConfig> load_model_config(const std::filesystem::path& model_dir);

// Weights of the whole model; tied embeddings count once. kInvalidArgument if it overflows int64.
Result<std::int64_t> count_weights(const ModelConfig& config);

// Inverse frequencies [head_dim / 2] in fp32, each operation in the order of the reference
// implementation, so that angles agree to the last bits also at large positions.
std::vector<float> rope_inv_freq(const ModelConfig& config);

}  // namespace spindle::model
