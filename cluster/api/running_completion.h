#pragma once
// One request on its way through tokenizer, engine and detokenizer.

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cluster/api/choice_text.h"
#include "cluster/api/completion.h"
#include "cluster/api/request_validation.h"
#include "cluster/engine/engine.h"
#include "cluster/telemetry/metrics.h"
#include "cluster/text/tokenizer.h"

namespace spindle::api {

// Made by CompletionService::start, kept alive by the handlers it has posted, by the engine until
// on_end, and by whoever holds the Completion. Owns the sink until the sink's last call.
//
// Thread-safety: cancel, cancel_requested, refuse and submit may be called from any thread;
// on_tokens, on_prompt_scores and on_end are called by the engine. Everything else happens on the
// executor, one handler at a time. Invariant: after the sink's last call `sink_` is empty, whatever
// still arrives.
class RunningCompletion final : public Completion,
                                public engine::EventSink,
                                public std::enable_shared_from_this<RunningCompletion> {
 public:
  RunningCompletion(engine::Engine& engine, const text::Tokenizer& tokenizer,
                    telemetry::Metrics& metrics, boost::asio::any_io_executor executor,
                    std::shared_ptr<OutputSink> sink);

  void cancel() override;
  bool cancel_requested() const { return cancel_requested_.load(std::memory_order_acquire); }

  // Ends a request that has not been submitted.
  void refuse(ApiError error);
  // Hands the request to the engine; its refusal is returned. `echo` is put before every choice.
  Status submit(engine::EngineRequest request, const ValidatedSampling& sampling, std::string echo);

  void on_tokens(std::span<const engine::TokenEvent> events) override;
  void on_prompt_scores(std::span<const engine::PromptScore> scores) override;
  void on_end(const Status& status, const engine::RequestSummary& summary) override;

 private:
  using Clock = std::chrono::steady_clock;

  void prepare_choices(const engine::EngineRequest& request, const ValidatedSampling& sampling);
  void observe_latencies(std::span<const engine::TokenEvent> events);
  // On the executor.
  void handle_submitted(engine::RequestHandle handle);
  void handle_tokens(std::vector<engine::TokenEvent> events);
  void handle_scores(std::vector<engine::PromptScore> scores);
  // First to last token as the engine's thread saw them.
  double decode_seconds() const;
  void handle_end(const Status& status, engine::RequestSummary summary, double decode_seconds);
  void handle_cancel();
  void end_with(const ApiError& error);
  void count_outcome(const Status& status, const engine::RequestSummary& summary,
                     double decode_seconds);
  bool may_call_sink() const { return sink_ != nullptr && !cancel_requested(); }

  engine::Engine& engine_;
  const text::Tokenizer& tokenizer_;
  telemetry::Metrics& metrics_;
  const boost::asio::any_io_executor executor_;
  const Clock::time_point arrival_ = Clock::now();
  std::atomic<bool> cancel_requested_{false};

  // Written before submit, then read only.
  std::int32_t prompt_tokens_ = 0;
  std::int32_t max_tokens_ = 0;
  std::string echo_;

  // On the executor.
  std::shared_ptr<OutputSink> sink_;
  std::optional<engine::RequestHandle> handle_;
  // The engine may report before submit has returned the handle.
  std::vector<std::function<void()>> before_handle_;
  std::vector<ChoiceText> choices_;
  std::int32_t completion_tokens_ = 0;
  std::vector<std::int32_t> choice_tokens_;  // of those, by choice

  // On the engine's thread.
  std::optional<Clock::time_point> first_token_at_;
  std::vector<Clock::time_point> last_token_at_;  // by choice
};

}  // namespace spindle::api
