#pragma once
// Default sampling settings of a model, read from its generation_config.json.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::model {

// Plain values; what the file does not give (or gives as null) is absent. Fields that are not
// listed are ignored. The upper bound of token ids is checked against the vocabulary by the caller
// that knows it; here they are in [0, kMaxVocabSize).
//
// Thread-safety: plain values.
struct GenerationConfig {
  std::vector<std::int32_t> eos_token_ids;  // empty: use those of the model's config.json
  std::optional<std::int32_t> bos_token_id;
  std::optional<std::int32_t> pad_token_id;
  std::optional<bool> do_sample;
  std::optional<float> temperature;   // 0 (greedy) when do_sample is false, whatever the file says
  std::optional<std::int32_t> top_k;  // 0: off
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<std::int64_t> max_new_tokens;
};

Result<GenerationConfig> parse_generation_config(std::string_view json);
// Reads `model_dir`/generation_config.json (at most 1 MiB); a missing file gives an empty config.
Result<GenerationConfig> load_generation_config(const std::filesystem::path& model_dir);

}  // namespace spindle::model
