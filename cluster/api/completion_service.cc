#include "cluster/api/completion_service.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <utility>

#include "cluster/api/running_completion.h"
#include "cluster/text/utf8.h"

namespace spindle::api {
namespace asio = boost::asio;

namespace {

bool is_chat(const CompletionService::Prompt& prompt) {
  return std::holds_alternative<ChatPrompt>(prompt);
}

ApiError too_many_tokens(std::size_t max_tokens, bool chat) {
  return prompt_too_long(fmt::format("the prompt has more than the {} tokens that fit", max_tokens),
                         chat ? "messages" : "prompt");
}

// Takes a place among the prompts that wait to be tokenised, and gives it back.
class QueuedPrompt {
 public:
  QueuedPrompt(std::shared_ptr<std::atomic<std::int32_t>> count, std::int32_t limit)
      : count_(std::move(count)) {
    taken_ = count_->fetch_add(1, std::memory_order_acq_rel) < limit;
    if (!taken_) count_->fetch_sub(1, std::memory_order_acq_rel);
  }
  QueuedPrompt(const QueuedPrompt&) = delete;
  QueuedPrompt& operator=(const QueuedPrompt&) = delete;
  ~QueuedPrompt() {
    if (taken_) count_->fetch_sub(1, std::memory_order_acq_rel);
  }
  bool taken() const { return taken_; }

 private:
  std::shared_ptr<std::atomic<std::int32_t>> count_;
  bool taken_ = false;
};

}  // namespace

CompletionService::CompletionService(engine::Engine& engine, const text::Tokenizer& tokenizer,
                                     std::optional<text::ModelChatTemplate> chat_template,
                                     ServiceConfig config, telemetry::Metrics& metrics,
                                     asio::thread_pool& tokenizer_pool)
    : engine_(engine),
      tokenizer_(tokenizer),
      chat_template_(std::move(chat_template)),
      config_(std::move(config)),
      metrics_(metrics),
      tokenizer_pool_(tokenizer_pool),
      queued_prompts_(std::make_shared<std::atomic<std::int32_t>>(0)) {}

std::optional<ApiError> CompletionService::check_model(const std::string& model) const {
  if (model.empty() || model == config_.served_model_name) return std::nullopt;
  ApiError error{not_found(fmt::format("the model `{}` does not exist", model)), "model"};
  error.code = "model_not_found";
  return error;
}

ApiError CompletionService::with_retry(Status status) const {
  ApiError error{std::move(status)};
  const StatusCode code = error.status.code();
  if (code == StatusCode::kResourceExhausted || code == StatusCode::kUnavailable) {
    error.retry_after_ms = config_.retry_after_ms;
  }
  if (code == StatusCode::kUnavailable && engine_.stats().draining) error.code = "draining";
  return error;
}

std::optional<ApiError> CompletionService::admission() const {
  Status status = engine_.admission();
  if (status.ok()) return std::nullopt;
  return with_retry(std::move(status));
}

std::optional<ApiError> CompletionService::check_size(const Prompt& prompt) const {
  const auto longest = static_cast<std::size_t>(engine_.limits().max_model_len);
  if (const auto* text = std::get_if<std::string>(&prompt)) {
    if (text->empty()) return invalid_field("prompt", "prompt must not be empty");
    // No tokenisation of so many bytes could fit.
    if (text->size() / tokenizer_.max_token_bytes() > longest) {
      return too_many_tokens(longest, false);
    }
  } else if (const auto* ids = std::get_if<std::vector<std::int32_t>>(&prompt)) {
    if (ids->empty()) return invalid_field("prompt", "prompt must not be empty");
    if (ids->size() > longest) return too_many_tokens(longest, false);
  } else {
    if (std::get<ChatPrompt>(prompt).messages.empty()) {
      return invalid_field("messages", "messages must not be empty");
    }
    if (!chat_template_) {
      return ApiError{unimplemented("the served model has no chat template"), "messages"};
    }
  }
  return std::nullopt;
}

std::optional<ApiError> CompletionService::encode_text(std::string_view text, bool chat,
                                                       bool add_special_tokens,
                                                       std::size_t max_tokens,
                                                       std::vector<std::int32_t>& ids) const {
  const std::string field = chat ? "messages" : "prompt";
  if (const auto offset = text::find_invalid_utf8(text)) {
    return invalid_field(field, fmt::format("invalid UTF-8 at byte {}", *offset));
  }
  text::EncodeOptions options;
  options.add_special_tokens = add_special_tokens;
  options.max_tokens = max_tokens;
  auto encoded = tokenizer_.encode(text, options);
  if (!encoded.ok()) {
    // Of valid text, only too many tokens are the client's fault.
    if (encoded.status().code() == StatusCode::kInvalidArgument) {
      return too_many_tokens(max_tokens, chat);
    }
    return ApiError{encoded.status(), field};
  }
  ids = std::move(*encoded);
  return std::nullopt;
}

std::optional<ApiError> CompletionService::encode(const Prompt& prompt, bool add_special_tokens,
                                                  std::size_t max_tokens,
                                                  std::vector<std::int32_t>& ids) const {
  if (const auto* text = std::get_if<std::string>(&prompt)) {
    return encode_text(*text, false, add_special_tokens, max_tokens, ids);
  }
  if (const auto* given = std::get_if<std::vector<std::int32_t>>(&prompt)) {
    for (const std::int32_t id : *given) {
      if (id >= 0 && id < engine_.limits().vocab_size) continue;
      return invalid_field("prompt", fmt::format("prompt holds {}, which is no token id", id));
    }
    if (given->size() > max_tokens) return too_many_tokens(max_tokens, false);
    ids = *given;
    return std::nullopt;
  }
  const auto& chat = std::get<ChatPrompt>(prompt);
  std::string text;
  if (auto error = render(chat, chat.messages.size(), chat.add_generation_prompt, text)) {
    return error;
  }
  // The template writes the special tokens itself.
  return encode_text(text, true, false, max_tokens, ids);
}

std::optional<ApiError> CompletionService::render(const ChatPrompt& chat, std::size_t n_messages,
                                                  bool add_generation_prompt,
                                                  std::string& text) const {
  if (!chat_template_) {
    return ApiError{unimplemented("the served model has no chat template"), "messages"};
  }
  boost::json::object conversation = chat.template_variables;
  conversation["messages"] = boost::json::array(
      chat.messages.begin(), chat.messages.begin() + static_cast<std::ptrdiff_t>(n_messages));
  conversation["add_generation_prompt"] = add_generation_prompt;
  auto rendered = chat_template_->render(conversation);
  if (!rendered.ok()) return ApiError{rendered.status(), "messages"};
  text = std::move(*rendered);
  return std::nullopt;
}

std::optional<ApiError> CompletionService::message_ends(const ChatPrompt& chat,
                                                        const std::vector<std::int32_t>& ids,
                                                        std::vector<std::int32_t>& ends) const {
  std::string whole;
  if (auto error = render(chat, chat.messages.size(), chat.add_generation_prompt, whole)) {
    return error;
  }
  for (const std::size_t message : chat.compress_after) {
    const std::string field = fmt::format("messages[{}].compress", message);
    std::string text;
    if (auto error = render(chat, message + 1, /*add_generation_prompt=*/false, text)) {
      error->param = field;
      return error;
    }
    if (!whole.starts_with(text)) {
      return invalid_field(field,
                           "the chat template renders the messages up to this one as a text "
                           "that the whole conversation does not begin with, so there is no "
                           "place to compress at; use compress_at");
    }
    std::vector<std::int32_t> begin;
    if (auto error = encode_text(text, true, false, ids.size(), begin)) {
      error->param = field;
      return error;
    }
    // A token may reach over the end of the message: the ones before it count.
    const auto differing = std::mismatch(begin.begin(), begin.end(), ids.begin(), ids.end());
    const auto length = static_cast<std::int32_t>(differing.second - ids.begin());
    if (length == 0) return invalid_field(field, "there are no tokens before the message's end");
    ends.push_back(length);
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  return std::nullopt;
}

Result<std::string> CompletionService::decode(const std::vector<std::int32_t>& ids) const {
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= engine_.limits().vocab_size) {
      return invalid_argument(fmt::format("{} is no token id", id));
    }
  }
  return tokenizer_.decode(ids, /*skip_special=*/false);
}

void CompletionService::show_prompt(const std::string& request_id,
                                    std::span<const std::int32_t> ids) const {
  // A token is a byte at least, so that these are enough.
  const auto n_shown = std::min(ids.size(), static_cast<std::size_t>(config_.max_seen_bytes) + 1);
  std::string text = tokenizer_.decode(ids.first(n_shown), /*skip_special=*/false);
  config_.see_prompt(request_id, text);
}

std::optional<ApiError> CompletionService::run(GenerateRequest& request, Validated& validated,
                                               RunningCompletion& completion) const {
  const engine::EngineLimits& limits = engine_.limits();
  ValidatedSampling& sampling = validated.sampling;
  engine::EngineRequest out;
  if (auto error = encode(request.prompt, request.add_special_tokens,
                          static_cast<std::size_t>(limits.max_model_len), out.prompt_ids)) {
    return error;
  }
  if (out.prompt_ids.empty()) {
    return invalid_field(is_chat(request.prompt) ? "messages" : "prompt",
                         "the prompt has no tokens");
  }
  if (auto error = fit_to_context(out.prompt_ids.size(), is_chat(request.prompt),
                                  limits.max_model_len, sampling)) {
    return error;
  }
  const auto* chat = std::get_if<ChatPrompt>(&request.prompt);
  if (chat != nullptr && !chat->compress_after.empty()) {
    if (auto error = message_ends(*chat, out.prompt_ids, validated.kv.compress_at)) return error;
  }
  if (auto error = fit_to_prompt(validated.kv, out.prompt_ids.size())) return error;
  if (config_.see_prompt) show_prompt(request.request_id, out.prompt_ids);
  std::string echo;
  if (request.echo) {
    const auto* text = std::get_if<std::string>(&request.prompt);
    echo =
        text != nullptr ? *text : tokenizer_.decode(out.prompt_ids, sampling.skip_special_tokens);
  }
  out.request_id = std::move(request.request_id);
  out.sampling = sampling.params;
  out.kv_policy = std::move(validated.kv.policy);
  out.compress_at = std::move(validated.kv.compress_at);
  out.session_id = std::move(request.session_id);
  out.owner = request.owner;
  out.keep_session = request.keep_session;
  out.priority = static_cast<std::int32_t>(request.priority);
  out.timeout_us = request.timeout_ms * 1000;
  out.prompt_scores = validated.kv.scores;
  if (completion.cancel_requested()) return ApiError{cancelled("the request was cancelled")};
  Status status = completion.submit(std::move(out), sampling, std::move(echo));
  if (!status.ok()) return with_retry(std::move(status));
  return std::nullopt;
}

std::shared_ptr<Completion> CompletionService::start(GenerateRequest request,
                                                     asio::any_io_executor executor,
                                                     std::shared_ptr<OutputSink> sink) {
  auto completion = std::make_shared<RunningCompletion>(engine_, tokenizer_, metrics_,
                                                        std::move(executor), std::move(sink));
  Validated validated;
  std::optional<ApiError> error = check_model(request.model);
  if (!error) {
    error = validate_sampling(request.sampling, engine_.limits(), config_.limits, config_.defaults,
                              validated.sampling);
  }
  if (!error) error = validate_urgency(request);
  if (!error) {
    error = validate_kv(request, engine_.limits(), config_.limits, config_.kv_policy, validated.kv);
  }
  if (!error) error = check_size(request.prompt);
  if (!error) error = admission();
  auto place = std::make_shared<QueuedPrompt>(queued_prompts_, config_.max_queued_prompts);
  if (!error && !place->taken()) {
    error = with_retry(resource_exhausted("too many prompts wait to be tokenised"));
  }
  if (error) {
    completion->refuse(std::move(*error));
    return completion;
  }
  asio::post(tokenizer_pool_,
             [this, completion, place = std::move(place), request = std::move(request),
              validated = std::move(validated)]() mutable {
               if (completion->cancel_requested()) return;
               if (auto refusal = run(request, validated, *completion)) {
                 if (refusal->status.code() == StatusCode::kCancelled) return;
                 completion->refuse(std::move(*refusal));
               }
             });
  return completion;
}

}  // namespace spindle::api
