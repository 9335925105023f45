#include "cluster/api/request_validation.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cluster/api/range_check.h"

namespace spindle::api {
namespace {

void check_reals(const SamplingRequest& request, const GenerationDefaults& defaults,
                 RangeCheck& check, engine::SamplingParams& params) {
  const auto pick = [](const std::optional<double>& asked, const std::optional<float>& fallback,
                       double otherwise) {
    return asked ? *asked : static_cast<double>(fallback.value_or(static_cast<float>(otherwise)));
  };
  const double temperature = pick(request.temperature, defaults.temperature, 1.0);
  const double top_p = pick(request.top_p, defaults.top_p, 1.0);
  const double min_p = pick(request.min_p, defaults.min_p, 0.0);
  const double repetition = pick(request.repetition_penalty, defaults.repetition_penalty, 1.0);
  const double presence = request.presence_penalty.value_or(0.0);
  const double frequency = request.frequency_penalty.value_or(0.0);
  check.real("temperature", temperature, 0, RequestBounds::kMaxTemperature);
  check.real("top_p", top_p, 0, 1, /*open_low=*/true);
  check.real("min_p", min_p, 0, 1);
  check.real("repetition_penalty", repetition, 0, RequestBounds::kMaxRepetitionPenalty,
             /*open_low=*/true);
  check.real("presence_penalty", presence, -RequestBounds::kMaxPenalty, RequestBounds::kMaxPenalty);
  check.real("frequency_penalty", frequency, -RequestBounds::kMaxPenalty,
             RequestBounds::kMaxPenalty);
  if (!check.ok()) return;
  params.temperature = static_cast<float>(temperature);
  params.top_p = static_cast<float>(top_p);
  params.min_p = static_cast<float>(min_p);
  params.repetition_penalty = static_cast<float>(repetition);
  params.presence_penalty = static_cast<float>(presence);
  params.frequency_penalty = static_cast<float>(frequency);
  // A positive double below the smallest float would become an illegal 0.
  if (params.top_p == 0.0F) check.fail("top_p", "top_p is too small");
  if (params.repetition_penalty == 0.0F) {
    check.fail("repetition_penalty", "repetition_penalty is too small");
  }
}

void check_counts(const SamplingRequest& request, const engine::EngineLimits& engine_limits,
                  const config::Limits& limits, const GenerationDefaults& defaults,
                  RangeCheck& check, ValidatedSampling& out) {
  engine::SamplingParams& params = out.params;
  const std::int64_t n = request.n.value_or(1);
  check.integer("n", n, 1, std::min(limits.max_n(), engine_limits.max_n));
  // -1 is how vLLM's clients say "off". A k of the whole vocabulary or more is "off" too.
  const std::int64_t top_k = request.top_k.value_or(defaults.top_k.value_or(0));
  check.integer("top_k", top_k, -1, std::numeric_limits<std::int32_t>::max());
  const std::int64_t max_tokens =
      request.max_tokens.value_or(RequestBounds::kDefaultCompletionTokens);
  check.integer("max_tokens", max_tokens, 1, std::numeric_limits<std::int32_t>::max());
  const std::int64_t min_tokens = request.min_tokens.value_or(0);
  check.integer("min_tokens", min_tokens, 0, engine_limits.max_model_len);
  if (request.max_tokens && min_tokens > max_tokens) {
    check.fail("min_tokens", fmt::format("min_tokens must not exceed max_tokens ({}), got {}",
                                         max_tokens, min_tokens));
  }
  const std::int64_t logprobs = request.logprobs.value_or(0);
  check.integer("logprobs", logprobs, 0,
                std::min(limits.max_logprobs(), engine_limits.max_logprobs));
  if (!check.ok()) return;
  params.n_choices = static_cast<std::int32_t>(n);
  params.top_k =
      top_k <= 0 || top_k >= engine_limits.vocab_size ? 0 : static_cast<std::int32_t>(top_k);
  params.max_tokens = static_cast<std::int32_t>(max_tokens);
  params.min_tokens = static_cast<std::int32_t>(min_tokens);
  params.n_logprobs = request.logprobs ? static_cast<std::int32_t>(logprobs) : -1;
  out.max_tokens_given = request.max_tokens.has_value();
}

void check_token_lists(const SamplingRequest& request, const engine::EngineLimits& engine_limits,
                       const config::Limits& limits, RangeCheck& check,
                       engine::SamplingParams& params) {
  const auto max_bias = static_cast<std::size_t>(
      std::max(0, std::min(limits.max_logit_bias(), engine_limits.max_logit_bias)));
  if (request.logit_bias.size() > max_bias) {
    check.fail("logit_bias", fmt::format("logit_bias must have at most {} entries, got {}",
                                         max_bias, request.logit_bias.size()));
  }
  if (request.stop_token_ids.size() > RequestBounds::kMaxStopTokenIds) {
    check.fail("stop_token_ids",
               fmt::format("stop_token_ids must have at most {} entries, got {}",
                           RequestBounds::kMaxStopTokenIds, request.stop_token_ids.size()));
  }
  if (!check.ok()) return;
  for (const auto& [id, bias] : request.logit_bias) {
    check.integer("logit_bias", id, 0, engine_limits.vocab_size - 1);
    check.real("logit_bias", bias, -RequestBounds::kMaxLogitBias, RequestBounds::kMaxLogitBias);
    if (!check.ok()) return;
    params.logit_bias.emplace_back(static_cast<std::int32_t>(id), static_cast<float>(bias));
  }
  for (const std::int64_t id : request.stop_token_ids) {
    check.integer("stop_token_ids", id, 0, engine_limits.vocab_size - 1);
    if (!check.ok()) return;
    params.stop_token_ids.push_back(static_cast<std::int32_t>(id));
  }
}

void check_stop_strings(const SamplingRequest& request, const config::Limits& limits,
                        RangeCheck& check) {
  const auto max_strings = static_cast<std::size_t>(std::max(0, limits.max_stop_strings()));
  const auto max_bytes = static_cast<std::size_t>(std::max(0, limits.max_stop_bytes()));
  if (request.stop.size() > max_strings) {
    check.fail("stop", fmt::format("stop must have at most {} strings, got {}", max_strings,
                                   request.stop.size()));
  }
  for (const std::string& stop : request.stop) {
    if (stop.empty()) check.fail("stop", "stop must not contain an empty string");
    if (stop.size() > max_bytes) {
      check.fail("stop", fmt::format("a stop string must have at most {} bytes, got {}", max_bytes,
                                     stop.size()));
    }
  }
}

}  // namespace

ApiError invalid_field(std::string param, std::string message) {
  return {invalid_argument(std::move(message)), std::move(param)};
}

ApiError prompt_too_long(std::string message, std::string param) {
  ApiError error = invalid_field(std::move(param), std::move(message));
  error.code = "context_length_exceeded";
  return error;
}

std::optional<ApiError> validate_urgency(const GenerateRequest& request) {
  RangeCheck check;
  check.integer("priority", request.priority, engine::kMinPriority, engine::kMaxPriority);
  check.integer("timeout_ms", request.timeout_ms, 0, engine::kMaxTimeoutUs / 1000);
  return check.take();
}

std::optional<ApiError> validate_sampling(const SamplingRequest& request,
                                          const engine::EngineLimits& engine_limits,
                                          const config::Limits& limits,
                                          const GenerationDefaults& defaults,
                                          ValidatedSampling& out) {
  RangeCheck check;
  check_reals(request, defaults, check, out.params);
  check_counts(request, engine_limits, limits, defaults, check, out);
  check_token_lists(request, engine_limits, limits, check, out.params);
  check_stop_strings(request, limits, check);
  if (!check.ok()) return check.take();
  out.params.has_seed = request.seed.has_value();
  out.params.seed = request.seed.value_or(0);
  out.params.ignore_eos = request.ignore_eos;
  out.stop = request.stop;
  out.include_stop = request.include_stop_str_in_output;
  out.skip_special_tokens = request.skip_special_tokens;
  return std::nullopt;
}

std::optional<ApiError> fit_to_context(std::size_t prompt_tokens, bool is_chat,
                                       std::int32_t max_model_len, ValidatedSampling& sampling) {
  const std::string prompt_field = is_chat ? "messages" : "prompt";
  const auto longest = static_cast<std::size_t>(std::max(0, max_model_len));
  if (prompt_tokens >= longest) {
    return prompt_too_long(
        fmt::format("the prompt has {} tokens; the context of {} tokens leaves no room for output",
                    prompt_tokens, longest),
        prompt_field);
  }
  const auto room = static_cast<std::int32_t>(longest - prompt_tokens);
  engine::SamplingParams& params = sampling.params;
  if (sampling.max_tokens_given) {
    if (params.max_tokens > room) {
      return prompt_too_long(
          fmt::format("the prompt has {} tokens and max_tokens is {}; together they exceed the "
                      "context of {} tokens",
                      prompt_tokens, params.max_tokens, longest),
          "max_tokens");
    }
  } else {
    params.max_tokens = is_chat ? room : std::min(RequestBounds::kDefaultCompletionTokens, room);
  }
  if (params.min_tokens > params.max_tokens) {
    return invalid_field("min_tokens", fmt::format("min_tokens must not exceed the {} tokens this "
                                                   "request may generate, got {}",
                                                   params.max_tokens, params.min_tokens));
  }
  return std::nullopt;
}

}  // namespace spindle::api
