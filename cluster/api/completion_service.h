#pragma once
// From a validated request with text to deltas of text: everything that the TCP and HTTP sessions
// share. Limits, chat template, tokenising, the engine, detokenising, stop strings, usage.

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/thread_pool.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/api/kv_validation.h"
#include "cluster/api/request_validation.h"
#include "cluster/engine/engine.h"
#include "cluster/telemetry/metrics.h"
#include "cluster/text/chat_template.h"
#include "cluster/text/tokenizer.h"
#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::api {

class RunningCompletion;

struct ServiceConfig {
  std::string served_model_name;
  config::Limits limits;
  GenerationDefaults defaults;
  kvstore::KvPolicy kv_policy;  // of requests that bring none
  // Prompts that may wait for or be in tokenising, at least as many as may run and wait; beyond, a
  // request is refused with 503.
  std::int32_t max_queued_prompts = 256;
  // Sees the text of every prompt that was tokenised, cut to about max_seen_bytes. Empty: nobody
  // does. Called on the tokenizer pool.
  std::function<void(std::string_view request_id, std::string_view text)> see_prompt;
  std::int32_t max_seen_bytes = 1024;
  // What a refused client is told to wait.
  std::int64_t retry_after_ms = 1000;
};

// Starts requests and owns none of their output. It keeps references to the engine, tokenizer,
// metrics and pool, which must outlive it. At the end, join the pool, then the threads of the
// executors that requests were started with, then stop the engine, then destroy the executors.
//
// A request is checked in this order, so that a refusal costs as little as possible: model name,
// numbers and byte counts, the engine's admission, and only then template and tokenizer.
//
// Thread-safety: every member may be called from any thread.
class CompletionService {
 public:
  using Prompt = decltype(GenerateRequest::prompt);

  CompletionService(engine::Engine& engine, const text::Tokenizer& tokenizer,
                    std::optional<text::ModelChatTemplate> chat_template, ServiceConfig config,
                    telemetry::Metrics& metrics, boost::asio::thread_pool& tokenizer_pool);

  // Never calls the sink before it returns. `executor` must run handlers one at a time: a strand,
  // or an executor of a context with one thread. The service keeps the sink until its last call.
  std::shared_ptr<Completion> start(GenerateRequest request, boost::asio::any_io_executor executor,
                                    std::shared_ptr<OutputSink> sink);

  // OK, or why no request would be taken now.
  std::optional<ApiError> admission() const;
  // NOT_FOUND unless `model` is empty or the served name.
  std::optional<ApiError> check_model(const std::string& model) const;

  // Renders and tokenises. Takes time in proportion to the prompt: call it on tokenizer_pool().
  // At most `max_tokens` tokens: a longer prompt is an error with code context_length_exceeded.
  std::optional<ApiError> encode(const Prompt& prompt, bool add_special_tokens,
                                 std::size_t max_tokens, std::vector<std::int32_t>& ids) const;
  // Text of `ids`, special tokens included; ids outside the vocabulary are an error.
  Result<std::string> decode(const std::vector<std::int32_t>& ids) const;

  boost::asio::thread_pool& tokenizer_pool() const { return tokenizer_pool_; }
  engine::Engine& engine() const { return engine_; }
  const text::Tokenizer& tokenizer() const { return tokenizer_; }
  telemetry::Metrics& metrics() const { return metrics_; }
  const ServiceConfig& config() const { return config_; }

 private:
  // The status with what a refused client should know: when to retry, and whether it is a drain.
  ApiError with_retry(Status status) const;
  // Checks that cost nothing, before a prompt is looked at in detail.
  std::optional<ApiError> check_size(const Prompt& prompt) const;
  std::optional<ApiError> encode_text(std::string_view text, bool chat, bool add_special_tokens,
                                      std::size_t max_tokens, std::vector<std::int32_t>& ids) const;
  std::optional<ApiError> render(const ChatPrompt& chat, std::size_t n_messages,
                                 bool add_generation_prompt, std::string& text) const;
  // The lengths of the prompt `ids` at the ends of the messages in chat.compress_after, ascending.
  std::optional<ApiError> message_ends(const ChatPrompt& chat, const std::vector<std::int32_t>& ids,
                                       std::vector<std::int32_t>& ends) const;
  void show_prompt(const std::string& request_id, std::span<const std::int32_t> ids) const;
  struct Validated {
    ValidatedSampling sampling;
    ValidatedKv kv;
  };
  // On the pool: tokenise and submit.
  std::optional<ApiError> run(GenerateRequest& request, Validated& validated,
                              RunningCompletion& completion) const;

  engine::Engine& engine_;
  const text::Tokenizer& tokenizer_;
  std::optional<text::ModelChatTemplate> chat_template_;
  ServiceConfig config_;
  telemetry::Metrics& metrics_;
  boost::asio::thread_pool& tokenizer_pool_;
  std::shared_ptr<std::atomic<std::int32_t>> queued_prompts_;
};

}  // namespace spindle::api
