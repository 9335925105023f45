#include "worker/model/generation_config.h"

#include <string>

#include "worker/model/json_fields.h"
#include "worker/model/model_config.h"
#include "worker/model/regular_file.h"

namespace spindle::model {
namespace {

constexpr std::string_view kFileName = "generation_config.json";
constexpr std::uint64_t kMaxConfigBytes = 1 << 20;
constexpr NumberRange kTemperatureRange{0, 100, false};
constexpr NumberRange kTopPRange{0, 1, true};
constexpr NumberRange kMinPRange{0, 1, false};
constexpr NumberRange kPenaltyRange{0, 100, true};

std::optional<std::int32_t> narrow(const std::optional<std::int64_t>& value) {
  if (!value) return std::nullopt;
  return static_cast<std::int32_t>(*value);
}

}  // namespace

Result<GenerationConfig> parse_generation_config(std::string_view json_text) {
  if (json_text.size() > kMaxConfigBytes) {
    return too_large(std::string(kFileName) + ": " + std::to_string(json_text.size()) +
                     " bytes, at most " + std::to_string(kMaxConfigBytes) + " are allowed");
  }
  const Result<boost::json::object> object = parse_json_object(json_text, kFileName);
  if (!object.ok()) return object.status();
  FieldReader fields(*object);
  GenerationConfig config;
  config.eos_token_ids =
      fields.token_ids("eos_token_id", kMaxVocabSize).value_or(std::vector<std::int32_t>{});
  config.bos_token_id = narrow(fields.integer("bos_token_id", 0, kMaxVocabSize - 1));
  // -1 is written by old models that have no padding token.
  config.pad_token_id = narrow(fields.integer("pad_token_id", -1, kMaxVocabSize - 1));
  if (config.pad_token_id == -1) config.pad_token_id.reset();
  config.do_sample = fields.boolean("do_sample");
  config.temperature = fields.number("temperature", kTemperatureRange);
  config.top_k = narrow(fields.integer("top_k", 0, kMaxVocabSize));
  config.top_p = fields.number("top_p", kTopPRange);
  config.min_p = fields.number("min_p", kMinPRange);
  config.repetition_penalty = fields.number("repetition_penalty", kPenaltyRange);
  config.max_new_tokens = fields.integer("max_new_tokens", 1, kMaxPositions);
  if (!fields.status().ok()) return fields.status().with_context(kFileName);
  if (config.do_sample == false) config.temperature = 0.0f;
  return config;
}

Result<GenerationConfig> load_generation_config(const std::filesystem::path& model_dir) {
  const Result<std::string> text = read_text_file(model_dir / kFileName, kMaxConfigBytes);
  if (text.status().code() == StatusCode::kNotFound) return GenerationConfig{};
  if (!text.ok()) return text.status();
  return parse_generation_config(*text);
}

}  // namespace spindle::model
