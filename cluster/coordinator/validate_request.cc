#include <cmath>
#include <string>

#include "cluster/coordinator/scheduler.h"

namespace spindle::coordinator {
namespace {

Status out_of_range(const char* field, const std::string& range, const std::string& got) {
  return invalid_argument(std::string(field) + " must be " + range + ", got " + got);
}

Status check_real(const char* field, float value, bool in_range, const char* range) {
  if (std::isfinite(value) && in_range) return ok_status();
  return out_of_range(field, range, std::to_string(value));
}

Status check_count(const char* field, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return ok_status();
  return out_of_range(field, "between " + std::to_string(low) + " and " + std::to_string(high),
                      std::to_string(value));
}

Status check_token(const char* field, std::int32_t id, std::int32_t vocab_size) {
  if (id >= 0 && id < vocab_size) return ok_status();
  return invalid_argument(std::string(field) + ": token id " + std::to_string(id) +
                          " is not in the vocabulary of " + std::to_string(vocab_size));
}

Status check_reals(const engine::SamplingParams& p) {
  const Status checks[] = {
      check_real("temperature", p.temperature, p.temperature >= 0 && p.temperature <= 100,
                 "between 0 and 100"),
      check_real("top_p", p.top_p, p.top_p > 0 && p.top_p <= 1, "in (0, 1]"),
      check_real("min_p", p.min_p, p.min_p >= 0 && p.min_p <= 1, "in [0, 1]"),
      check_real("repetition_penalty", p.repetition_penalty,
                 p.repetition_penalty > 0 && p.repetition_penalty <= 100, "in (0, 100]"),
      check_real("presence_penalty", p.presence_penalty,
                 p.presence_penalty >= -2 && p.presence_penalty <= 2, "in [-2, 2]"),
      check_real("frequency_penalty", p.frequency_penalty,
                 p.frequency_penalty >= -2 && p.frequency_penalty <= 2, "in [-2, 2]"),
  };
  for (const Status& status : checks) {
    if (!status.ok()) return status;
  }
  return ok_status();
}

Status check_times(const engine::EngineRequest& request) {
  if (Status status =
          check_count("priority", request.priority, engine::kMinPriority, engine::kMaxPriority);
      !status.ok()) {
    return status;
  }
  return check_count("timeout_us", request.timeout_us, 0, engine::kMaxTimeoutUs);
}

Status check_counts(const engine::SamplingParams& p, const engine::EngineLimits& limits) {
  const Status checks[] = {
      check_count("top_k", p.top_k, 0, limits.vocab_size),
      check_count("n", p.n_choices, 1, limits.max_n),
      check_count("max_tokens", p.max_tokens, 1, limits.max_model_len),
      check_count("min_tokens", p.min_tokens, 0, p.max_tokens),
      check_count("logprobs", p.n_logprobs, -1, limits.max_logprobs),
      check_count("logit_bias entries", static_cast<std::int64_t>(p.logit_bias.size()), 0,
                  limits.max_logit_bias),
      check_count("stop_token_ids entries", static_cast<std::int64_t>(p.stop_token_ids.size()), 0,
                  limits.max_logit_bias),
  };
  for (const Status& status : checks) {
    if (!status.ok()) return status;
  }
  return ok_status();
}

}  // namespace

Status validate_request(const engine::EngineRequest& request, const engine::EngineLimits& limits) {
  const engine::SamplingParams& p = request.sampling;
  if (request.prompt_ids.empty()) return invalid_argument("prompt is empty");
  const auto n_prompt = static_cast<std::int64_t>(request.prompt_ids.size());
  if (n_prompt >= limits.max_model_len) {
    return invalid_argument("prompt has " + std::to_string(n_prompt) +
                            " tokens; with at least one token of output the limit is " +
                            std::to_string(limits.max_model_len - 1));
  }
  for (const std::int32_t id : request.prompt_ids) {
    if (Status status = check_token("prompt", id, limits.vocab_size); !status.ok()) return status;
  }
  if (Status status = check_reals(p); !status.ok()) return status;
  if (Status status = check_counts(p, limits); !status.ok()) return status;
  if (Status status = check_times(request); !status.ok()) return status;
  for (const auto& [id, bias] : p.logit_bias) {
    if (Status status = check_token("logit_bias", id, limits.vocab_size); !status.ok()) {
      return status;
    }
    if (Status status =
            check_real("logit_bias", bias, bias >= -100 && bias <= 100, "between -100 and 100");
        !status.ok()) {
      return status;
    }
  }
  for (const std::int32_t id : p.stop_token_ids) {
    if (Status status = check_token("stop_token_ids", id, limits.vocab_size); !status.ok()) {
      return status;
    }
  }
  return ok_status();
}

}  // namespace spindle::coordinator
