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
    if (turn.compress()) {
      chat.compress_after.push_back(chat.messages.size());
    }
    chat.messages.emplace_back(std::move(object));
  }
  return chat;
}

KvPolicyRequest to_policy_request(const v1::KvPolicy& message) {
  KvPolicyRequest policy;
  policy.profile = message.profile();
  if (message.has_ratio()) {
    policy.ratio = message.ratio();
  }
  if (message.has_max_bytes()) {
    constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
    policy.max_bytes = static_cast<std::int64_t>(std::min(message.max_bytes(), kMost));
  }
  if (message.has_sinks()) {
    policy.sinks = message.sinks();
  }
  if (message.has_recent()) {
    policy.recent = message.recent();
  }
  if (message.has_window()) {
    policy.window = message.window();
  }
  for (const v1::KvOverride& from : message.overrides()) {
    KvOverrideRequest& to = policy.overrides.emplace_back();
    to.first_layer = from.first_layer();
    if (from.has_last_layer()) to.last_layer = from.last_layer();
    if (from.has_kv_head()) to.kv_head = from.kv_head();
    to.mode = from.mode();
    to.codec = from.codec();
    if (from.has_window()) to.window = from.window();
    if (from.has_keep_ratio()) to.keep_ratio = from.keep_ratio();
  }
  return policy;
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

void fill(const engine::HeadKvUse& use, v1::KvHeadKept& head) {
  head.set_layer(use.layer);
  head.set_kv_head(use.kv_head);
  head.set_plan(use.plan);
  head.set_kept_tokens(use.kept_tokens);
  head.set_bytes(use.bytes);
  if (use.lazy_mass) {
    head.set_lazy_mass(*use.lazy_mass);
  }
  if (use.k_entries_per_token) {
    head.set_k_entries_per_token(*use.k_entries_per_token);
  }
  if (use.v_entries_per_token) {
    head.set_v_entries_per_token(*use.v_entries_per_token);
  }
}

void fill(const engine::StageKvUse& use, v1::StageKv& stage) {
  stage.set_stage(use.stage);
  stage.set_full_bytes(use.full_bytes);
  stage.set_kept_bytes(use.kept_bytes);
  for (const engine::LayerKvUse& layer_use : use.layers) {
    v1::LayerKvUse& layer = *stage.add_layers();
    layer.set_layer(layer_use.layer);
    layer.set_full_bytes(layer_use.full_bytes);
    layer.set_kept_bytes(layer_use.kept_bytes);
  }
}

void fill(const std::vector<engine::BoundaryUse>& boundaries, v1::Usage& usage) {
  std::size_t n_heads = 0;
  for (const engine::BoundaryUse& boundary : boundaries) {
    n_heads += boundary.heads.size();
  }
  for (const engine::BoundaryUse& use : boundaries) {
    v1::KvBoundary& boundary = *usage.add_boundaries();
    boundary.set_position(use.position);
    boundary.set_full_bytes(use.full_bytes);
    boundary.set_kept_bytes(use.kept_bytes);
    boundary.set_compress_ms(use.compress_ms);
    if (n_heads > kMaxUsageHeads) {
      n_heads -= use.heads.size();
      continue;
    }
    for (const engine::HeadKvUse& head : use.heads) {
      fill(head, *boundary.add_heads());
    }
  }
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
  if (message.has_kv_policy()) {
    request.kv_policy = to_policy_request(message.kv_policy());
  }
  request.compress_at.assign(message.compress_at().begin(), message.compress_at().end());
  request.session_id = std::move(*message.mutable_session_id());
  request.keep_session = message.keep_session();
  request.priority = message.priority();
  request.timeout_ms = message.timeout_ms();
  if (message.has_prompt_scores()) {
    const v1::PromptScores& scores = message.prompt_scores();
    request.prompt_scores = {.first = scores.first(), .end = scores.end(), .dense = scores.dense()};
  }
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
  for (const engine::StageKvUse& use : summary.kv) {
    fill(use, *usage.add_kv());
  }
  usage.set_cached_tokens(summary.cached_tokens);
  fill(summary.boundaries, usage);
  return usage;
}

std::size_t score_bytes(const engine::PromptScore& score) {
  return sizeof score + score.dense.size() * sizeof(float);
}

void move_scores(std::deque<engine::PromptScore>& scores, std::size_t max_bytes,
                 v1::Scores& message) {
  std::size_t n_bytes = 0;
  while (!scores.empty()) {
    engine::PromptScore& score = scores.front();
    n_bytes += score_bytes(score);
    if (n_bytes > max_bytes && message.scores_size() > 0) {
      return;
    }
    v1::PromptScore& out = *message.add_scores();
    out.set_position(score.position);
    out.set_logprob(score.logprob);
    out.set_best_id(score.best_id);
    out.set_best_logprob(score.best_logprob);
    out.mutable_dense()->Add(score.dense.begin(), score.dense.end());
    scores.pop_front();
  }
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
  message.set_requests_expired(stats.expired);
  message.set_preemptions(stats.preemptions);
  message.set_recomputed_tokens(stats.recomputed_tokens);
  message.set_budget_plans(stats.budget_plans);
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
    stage.set_kv_committed_bytes(state.kv_committed_bytes);
    stage.set_kv_level_ratio(state.kv_level_ratio);
    stage.set_weight_bytes(state.weight_bytes);
    stage.set_steps(state.steps);
    stage.set_busy_seconds(state.busy_seconds);
    for (const engine::LayerState& held : state.layers) {
      v1::LayerKv& layer = *stage.add_layers();
      layer.set_layer(held.layer);
      layer.set_used_bytes(held.used_bytes);
    }
  }
  return message;
}

}  // namespace spindle::api
