#include "cluster/api/tcp_messages.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "cluster/api/tcp_errors.h"

namespace spindle::api {
namespace {

ChatPrompt to_chat_prompt(const v1::ChatPrompt& message) {
  ChatPrompt chat;
  chat.messages.reserve(static_cast<std::size_t>(message.messages_size()));
  for (const v1::ChatMessage& turn : message.messages()) {
    boost::json::object object;
    object["role"] = turn.role();
    object["content"] = turn.content();
    if (!turn.name().empty()) {
      object["name"] = turn.name();
    }
    chat.messages.emplace_back(std::move(object));
  }
  return chat;
}

SamplingRequest to_sampling_request(const v1::SamplingParams& message) {
  SamplingRequest sampling;
  const auto set = [](auto& to, bool present, auto value) {
    if (present) {
      to = value;
    }
  };
  set(sampling.max_tokens, message.has_max_tokens(), message.max_tokens());
  set(sampling.min_tokens, message.has_min_tokens(), message.min_tokens());
  set(sampling.temperature, message.has_temperature(), message.temperature());
  set(sampling.top_k, message.has_top_k(), message.top_k());
  set(sampling.top_p, message.has_top_p(), message.top_p());
  set(sampling.min_p, message.has_min_p(), message.min_p());
  set(sampling.repetition_penalty, message.has_repetition_penalty(), message.repetition_penalty());
  set(sampling.presence_penalty, message.has_presence_penalty(), message.presence_penalty());
  set(sampling.frequency_penalty, message.has_frequency_penalty(), message.frequency_penalty());
  set(sampling.seed, message.has_seed(), message.seed());
  set(sampling.include_stop_str_in_output, message.has_include_stop_str_in_output(),
      message.include_stop_str_in_output());
  set(sampling.ignore_eos, message.has_ignore_eos(), message.ignore_eos());
  set(sampling.skip_special_tokens, message.has_skip_special_tokens(),
      message.skip_special_tokens());
  set(sampling.logprobs, message.has_logprobs(), message.logprobs());
  set(sampling.n, message.has_n(), message.n());
  for (const auto& [token, bias] : message.logit_bias()) {
    sampling.logit_bias.emplace_back(token, bias);
  }
  // The map's order differs from run to run; a request's value does not.
  std::sort(sampling.logit_bias.begin(), sampling.logit_bias.end());
  sampling.stop.assign(message.stop().begin(), message.stop().end());
  sampling.stop_token_ids.assign(message.stop_token_ids().begin(), message.stop_token_ids().end());
  return sampling;
}

v1::FinishReason to_message(engine::FinishReason reason) {
  switch (reason) {
    case engine::FinishReason::kNone:
      return v1::NOT_FINISHED;
    case engine::FinishReason::kStop:
      return v1::STOP;
    case engine::FinishReason::kLength:
      return v1::LENGTH;
    case engine::FinishReason::kCancelled:
      return v1::CANCELLED;
    case engine::FinishReason::kFailed:
      return v1::FAILED;
  }
  return v1::FAILED;
}

void fill(OutputToken&& token, v1::TokenLogprob& message) {
  message.set_id(token.id);
  message.set_text(std::move(token.bytes));
  message.set_logprob(token.logprob);
}

std::string cut(std::string text) {
  if (text.size() <= kMaxErrorMessageBytes) {
    return text;
  }
  std::size_t end = kMaxErrorMessageBytes;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) {
    --end;
  }
  text.resize(end);
  return text + "...";
}

}  // namespace

ParsedRequest to_generate_request(v1::GenerateRequest&& message) {
  ParsedRequest parsed;
  GenerateRequest& request = parsed.request;
  request.request_id = std::move(*message.mutable_request_id());
  request.model = std::move(*message.mutable_model());
  request.sampling = to_sampling_request(message.sampling());
  switch (message.prompt_case()) {
    case v1::GenerateRequest::kText:
      request.prompt = std::move(*message.mutable_text());
      break;
    case v1::GenerateRequest::kTokens:
      request.prompt =
          std::vector<std::int32_t>(message.tokens().ids().begin(), message.tokens().ids().end());
      break;
    case v1::GenerateRequest::kChat:
      request.prompt = to_chat_prompt(message.chat());
      break;
    case v1::GenerateRequest::PROMPT_NOT_SET:
      parsed.error = {invalid_argument("the request has no prompt: set text, tokens or chat"),
                      "prompt"};
      break;
  }
  return parsed;
}

v1::Delta to_message(OutputDelta&& delta) {
  v1::Delta message;
  message.set_choice(delta.choice);
  message.set_text(std::move(delta.text));
  message.mutable_token_ids()->Add(delta.token_ids.begin(), delta.token_ids.end());
  for (OutputTokenInfo& info : delta.logprobs) {
    v1::TokenInfo& token = *message.add_logprobs();
    fill(std::move(info.chosen), *token.mutable_chosen());
    for (OutputToken& top : info.top) {
      fill(std::move(top), *token.add_top());
    }
  }
  message.set_finish_reason(to_message(delta.finish));
  message.set_stop_reason(std::move(delta.stop_reason));
  return message;
}

v1::Usage to_message(const engine::RequestSummary& summary) {
  v1::Usage usage;
  usage.set_prompt_tokens(summary.prompt_tokens);
  usage.set_completion_tokens(summary.completion_tokens);
  usage.set_queue_ms(summary.queue_ms);
  usage.set_time_to_first_token_ms(summary.time_to_first_token_ms);
  usage.set_total_ms(summary.total_ms);
  for (const engine::StageKvUse& kv : summary.kv) {
    v1::StageKv& stage = *usage.add_kv();
    stage.set_stage(kv.stage);
    stage.set_full_bytes(kv.full_bytes);
    stage.set_kept_bytes(kv.kept_bytes);
  }
  return usage;
}

v1::Error to_message(const ApiError& error) {
  v1::Error message;
  message.set_code(error_code_of(error.status.code()));
  message.set_message(cut(error.status.message()));
  const bool sampling = v1::SamplingParams::descriptor()->FindFieldByName(error.param) != nullptr;
  message.set_param(sampling ? "sampling." + error.param : cut(error.param));
  message.set_retry_after_ms(static_cast<std::int32_t>(
      std::clamp<std::int64_t>(error.retry_after_ms, 0, std::numeric_limits<std::int32_t>::max())));
  return message;
}

v1::Stats to_message(const engine::EngineStats& stats) {
  v1::Stats message;
  message.set_running_requests(stats.running);
  message.set_waiting_requests(stats.waiting);
  message.set_waiting_prompt_tokens(stats.waiting_prompt_tokens);
  message.set_prompt_tokens(stats.prompt_tokens);
  message.set_generation_tokens(stats.generation_tokens);
  message.set_requests_accepted(stats.accepted);
  message.set_requests_finished(stats.finished);
  message.set_requests_failed(stats.failed);
  message.set_requests_cancelled(stats.cancelled);
  message.set_requests_refused(stats.refused);
  message.set_steps(stats.steps);
  message.set_draining(stats.draining);
  for (const engine::StageState& state : stats.stages) {
    v1::StageStats& stage = *message.add_stages();
    stage.set_stage(state.stage);
    stage.set_host(state.host);
    stage.set_device(state.device);
    stage.set_first_layer(state.first_layer);
    stage.set_n_layers(state.n_layers);
    stage.set_kv_capacity_bytes(state.kv_capacity_bytes);
    stage.set_kv_used_bytes(state.kv_used_bytes);
    stage.set_kv_peak_bytes(state.kv_peak_bytes);
    stage.set_weight_bytes(state.weight_bytes);
    stage.set_steps(state.steps);
    stage.set_busy_seconds(state.busy_seconds);
    for (std::size_t i = 0; i < state.layer_used_bytes.size(); ++i) {
      v1::LayerKv& layer = *stage.add_layers();
      layer.set_layer(state.first_layer + static_cast<std::int32_t>(i));
      layer.set_used_bytes(state.layer_used_bytes[i]);
    }
  }
  return message;
}

}  // namespace spindle::api
