#pragma once
// The range of every number a client may send, in one place, checked before anything is tokenised.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/engine/engine.h"
#include "proto/config.pb.h"

namespace spindle::api {

// Values for fields that a request leaves out, from the model's generation_config.json. Unset:
// OpenAI's defaults (temperature 1, everything else off).
struct GenerationDefaults {
  std::optional<float> temperature;
  std::optional<std::int32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
};

// Bounds that are not configured.
struct RequestBounds {
  static constexpr double kMaxTemperature = 2.0;
  static constexpr double kMaxPenalty = 2.0;             // presence, frequency: [-2, 2]
  static constexpr double kMaxRepetitionPenalty = 10.0;  // (0, 10]
  static constexpr double kMaxLogitBias = 100.0;         // [-100, 100]
  static constexpr std::size_t kMaxStopTokenIds = 256;
  static constexpr std::int32_t kDefaultCompletionTokens = 16;  // as OpenAI; chat: what is left
};

// A validated request: the engine's parameters, except max_tokens when the prompt's length decides.
struct ValidatedSampling {
  engine::SamplingParams params;
  std::vector<std::string> stop;
  bool include_stop = false;
  bool skip_special_tokens = true;
  bool max_tokens_given = false;
};

// Fills `out`, or returns an error that names the field, its range and the value.
std::optional<ApiError> validate_sampling(const SamplingRequest& request,
                                          const engine::EngineLimits& engine_limits,
                                          const config::Limits& limits,
                                          const GenerationDefaults& defaults,
                                          ValidatedSampling& out);

// Priority and time limit.
std::optional<ApiError> validate_urgency(const GenerateRequest& request);

// Decides max_tokens once the prompt's length is known; an error with code context_length_exceeded
// when prompt and output do not fit.
std::optional<ApiError> fit_to_context(std::size_t prompt_tokens, bool is_chat,
                                       std::int32_t max_model_len, ValidatedSampling& sampling);

ApiError invalid_field(std::string param, std::string message);
ApiError prompt_too_long(std::string message, std::string param = "prompt");

}  // namespace spindle::api
