#include "cluster/api/openai_response.h"

#include <iterator>

#include "cluster/api/http_errors.h"
#include "cluster/api/json_text.h"
#include "cluster/api/openai_kv.h"
#include "cluster/api/openai_logprobs.h"
#include "kernels/core/check.h"

namespace spindle::api {
namespace {

std::string_view finish_name(engine::FinishReason reason) {
  switch (reason) {
    case engine::FinishReason::kStop:
      return "stop";
    case engine::FinishReason::kLength:
      return "length";
    case engine::FinishReason::kNone:
    case engine::FinishReason::kCancelled:
    case engine::FinishReason::kFailed:
      return "";
  }
  return "";
}

void append_usage_object(std::string& out, const UsageCounts& usage) {
  out += R"("usage":{"prompt_tokens":)";
  append_json_integer(out, usage.prompt_tokens);
  out += R"(,"completion_tokens":)";
  append_json_integer(out, usage.completion_tokens);
  out += R"(,"total_tokens":)";
  append_json_integer(out, usage.prompt_tokens + usage.completion_tokens);
  out += R"(,"prompt_tokens_details":{"cached_tokens":)";
  append_json_integer(out, usage.cached_tokens);
  out += '}';
  if (!usage.kv.empty()) {
    out += R"(,"spindle_kv":)";
    append_kv_use(out, usage.kv);
  }
  out += '}';
}

std::string head_text(std::string_view id_prefix, std::string_view request_id,
                      std::string_view object, std::int64_t created, std::string_view model) {
  std::string out = R"({"id":)";
  append_json_string(out, std::string(id_prefix) + std::string(request_id));
  out += R"(,"object":)";
  append_json_string(out, object);
  out += R"(,"created":)";
  append_json_integer(out, created);
  out += R"(,"model":)";
  append_json_string(out, model);
  out += R"(,"system_fingerprint":null)";
  return out;
}

}  // namespace

void merge_delta(OutputDelta& into, OutputDelta from) {
  into.text += from.text;
  into.token_ids.insert(into.token_ids.end(), from.token_ids.begin(), from.token_ids.end());
  into.logprobs.insert(into.logprobs.end(), std::make_move_iterator(from.logprobs.begin()),
                       std::make_move_iterator(from.logprobs.end()));
  if (from.finish != engine::FinishReason::kNone) {
    into.finish = from.finish;
    into.stop_reason = std::move(from.stop_reason);
    into.stopped_by_token = from.stopped_by_token;
  }
}

std::size_t delta_bytes(const OutputDelta& delta) {
  std::size_t bytes = delta.text.size() + delta.token_ids.size() * sizeof(std::int32_t);
  for (const OutputTokenInfo& info : delta.logprobs) {
    bytes += (1 + info.top.size()) * sizeof(OutputToken);
  }
  return bytes;
}

OpenAiWriter::OpenAiWriter(const OpenAiRequest& request, std::string_view request_id,
                           std::int64_t created, std::string_view model)
    : kind_(request.kind),
      logprobs_(request.logprobs),
      include_usage_(request.include_usage),
      text_offsets_(request.prompts.size() * static_cast<std::size_t>(request.n), 0) {
  const bool chat = kind_ == OpenAiKind::kChat;
  const std::string_view prefix = chat ? "chatcmpl-" : "cmpl-";
  head_ = head_text(prefix, request_id, chat ? "chat.completion.chunk" : "text_completion", created,
                    model);
  body_head_ =
      head_text(prefix, request_id, chat ? "chat.completion" : "text_completion", created, model);
}

void OpenAiWriter::begin_event(std::string& out, std::int32_t choice) const {
  out += "data: ";
  out += head_;
  out += R"(,"choices":[{"index":)";
  append_json_integer(out, choice);
}

void OpenAiWriter::end_event(std::string& out) const {
  out += include_usage_ ? R"(}],"usage":null})" : "}]}";
  out += "\n\n";
}

void OpenAiWriter::append_logprobs(std::string& out, const OutputDelta& delta) {
  out += R"(,"logprobs":)";
  if (!logprobs_ || delta.logprobs.empty()) {
    out += "null";
  } else if (kind_ == OpenAiKind::kChat) {
    append_chat_logprobs(out, delta.logprobs);
  } else {
    const auto choice = static_cast<std::size_t>(delta.choice);
    CHECK(choice < text_offsets_.size(), "choice out of range");
    append_completion_logprobs(out, delta.logprobs, text_offsets_[choice]);
  }
}

void OpenAiWriter::append_choice_end(std::string& out, const OutputDelta& delta) const {
  const std::string_view reason = finish_name(delta.finish);
  out += R"(,"finish_reason":)";
  append_json_string_or_null(out, reason);
  if (reason.empty()) return;
  // vLLM's extra field: the stop string, the stop token's id as a number, or null.
  out += R"(,"stop_reason":)";
  if (delta.stopped_by_token) {
    out += delta.stop_reason;
  } else {
    append_json_string_or_null(out, delta.stop_reason);
  }
}

void OpenAiWriter::append_role(std::string& out, std::int32_t choice) const {
  if (kind_ != OpenAiKind::kChat) return;
  begin_event(out, choice);
  out += R"(,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null)";
  end_event(out);
}

void OpenAiWriter::append_chat_delta(std::string& out, const OutputDelta& delta) {
  if (!delta.text.empty() || (logprobs_ && !delta.logprobs.empty())) {
    begin_event(out, delta.choice);
    out += R"(,"delta":{"content":)";
    append_json_string(out, delta.text);
    out += '}';
    append_logprobs(out, delta);
    out += R"(,"finish_reason":null)";
    end_event(out);
  }
  if (!finish_name(delta.finish).empty()) {
    begin_event(out, delta.choice);
    out += R"(,"delta":{},"logprobs":null)";
    append_choice_end(out, delta);
    end_event(out);
  }
}

void OpenAiWriter::append_completion_delta(std::string& out, const OutputDelta& delta) {
  const bool has_logprobs = logprobs_ && !delta.logprobs.empty();
  if (delta.text.empty() && !has_logprobs && finish_name(delta.finish).empty()) return;
  begin_event(out, delta.choice);
  out += R"(,"text":)";
  append_json_string(out, delta.text);
  append_logprobs(out, delta);
  append_choice_end(out, delta);
  end_event(out);
}

void OpenAiWriter::append_delta(std::string& out, const OutputDelta& delta) {
  if (kind_ == OpenAiKind::kChat) {
    append_chat_delta(out, delta);
  } else {
    append_completion_delta(out, delta);
  }
}

void OpenAiWriter::append_usage(std::string& out, const UsageCounts& usage) const {
  out += "data: ";
  out += head_;
  out += R"(,"choices":[],)";
  append_usage_object(out, usage);
  out += "}\n\n";
}

void OpenAiWriter::append_error(std::string& out, const ApiError& error) {
  out += "data: ";
  out += error_body(error);
  out += "\n\n";
}

std::string OpenAiWriter::body(const std::vector<OutputDelta>& choices, const UsageCounts& usage) {
  std::string out = body_head_;
  out += R"(,"choices":[)";
  for (std::size_t i = 0; i < choices.size(); ++i) {
    const OutputDelta& choice = choices[i];
    out += i > 0 ? R"(,{"index":)" : R"({"index":)";
    append_json_integer(out, choice.choice);
    if (kind_ == OpenAiKind::kChat) {
      out += R"(,"message":{"role":"assistant","content":)";
      append_json_string(out, choice.text);
      out += R"(,"refusal":null})";
    } else {
      out += R"(,"text":)";
      append_json_string(out, choice.text);
    }
    append_logprobs(out, choice);
    append_choice_end(out, choice);
    out += '}';
  }
  out += "],";
  append_usage_object(out, usage);
  out += '}';
  return out;
}

}  // namespace spindle::api
