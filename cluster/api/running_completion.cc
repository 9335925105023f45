#include "cluster/api/running_completion.h"

#include <algorithm>
#include <boost/asio/post.hpp>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::api {
namespace asio = boost::asio;

namespace {

double seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

OutputDelta& delta_of_choice(std::vector<OutputDelta>& deltas, std::int32_t choice) {
  for (OutputDelta& delta : deltas) {
    if (delta.choice == choice) return delta;
  }
  deltas.emplace_back().choice = choice;
  return deltas.back();
}

bool has_output(const OutputDelta& delta) {
  return !delta.text.empty() || !delta.token_ids.empty() ||
         delta.finish != engine::FinishReason::kNone;
}

}  // namespace

RunningCompletion::RunningCompletion(engine::Engine& engine, const text::Tokenizer& tokenizer,
                                     telemetry::Metrics& metrics, asio::any_io_executor executor,
                                     std::shared_ptr<OutputSink> sink)
    : engine_(engine),
      tokenizer_(tokenizer),
      metrics_(metrics),
      executor_(std::move(executor)),
      sink_(std::move(sink)) {}

void RunningCompletion::cancel() {
  if (cancel_requested_.exchange(true, std::memory_order_acq_rel)) return;
  asio::post(executor_, [self = shared_from_this()] { self->handle_cancel(); });
}

void RunningCompletion::handle_cancel() {
  if (!sink_) return;
  end_with({cancelled("the request was cancelled")});
  if (handle_) engine_.cancel(*handle_);
}

void RunningCompletion::refuse(ApiError error) {
  const StatusCode code = error.status.code();
  metrics_.count_refused(code == StatusCode::kResourceExhausted
                             ? telemetry::RefusalReason::kQueueFull
                         : code == StatusCode::kUnavailable ? telemetry::RefusalReason::kUnavailable
                                                            : telemetry::RefusalReason::kInvalid);
  asio::post(executor_, [self = shared_from_this(), error = std::move(error)] {
    if (self->may_call_sink()) self->end_with(error);
  });
}

void RunningCompletion::end_with(const ApiError& error) {
  // The sink may drop its last reference to this object; the caller holds one.
  const std::shared_ptr<OutputSink> sink = std::move(sink_);
  sink_ = nullptr;
  sink->on_error(error);
}

void RunningCompletion::prepare_choices(const engine::EngineRequest& request,
                                        const ValidatedSampling& sampling) {
  ChoiceOptions options;
  options.skip_special_tokens = sampling.skip_special_tokens;
  options.logprobs = request.sampling.n_logprobs >= 0;
  options.min_tokens = request.sampling.min_tokens;
  options.stop = sampling.stop;
  options.include_stop = sampling.include_stop;
  options.stop_token_ids = request.sampling.stop_token_ids;
  std::optional<text::StopStringMatcher> matcher;
  if (!sampling.stop.empty()) {
    auto created = text::StopStringMatcher::create(sampling.stop, sampling.include_stop);
    CHECK(created.ok(), "stop strings were validated");
    matcher = std::move(*created);
  }
  const auto n = static_cast<std::size_t>(request.sampling.n_choices);
  choices_.reserve(n);
  for (std::size_t i = 0; i < n; ++i) choices_.emplace_back(tokenizer_, options, matcher);
  last_token_at_.assign(n, Clock::time_point());
  choice_tokens_.assign(n, 0);
}

Status RunningCompletion::submit(engine::EngineRequest request, const ValidatedSampling& sampling,
                                 std::string echo) {
  prompt_tokens_ = static_cast<std::int32_t>(request.prompt_ids.size());
  max_tokens_ = request.sampling.max_tokens;
  echo_ = std::move(echo);
  prepare_choices(request, sampling);
  auto handle = engine_.submit(std::move(request), shared_from_this());
  if (!handle.ok()) return handle.status();
  asio::post(executor_, [self = shared_from_this(), id = *handle] { self->handle_submitted(id); });
  return ok_status();
}

void RunningCompletion::handle_submitted(engine::RequestHandle handle) {
  handle_ = handle;
  if (!sink_) engine_.cancel(handle);  // cancelled while it was being submitted
  if (may_call_sink()) sink_->on_accepted(prompt_tokens_);
  for (std::size_t i = 0; !echo_.empty() && i < choices_.size() && may_call_sink(); ++i) {
    OutputDelta delta;
    delta.choice = static_cast<std::int32_t>(i);
    delta.text = echo_;
    sink_->on_delta(std::move(delta));
  }
  for (auto& handler : std::exchange(before_handle_, {})) handler();
}

void RunningCompletion::observe_latencies(std::span<const engine::TokenEvent> events) {
  const Clock::time_point now = Clock::now();
  for (const engine::TokenEvent& event : events) {
    if (!first_token_at_) metrics_.observe_time_to_first_token(seconds(now - arrival_));
    if (!first_token_at_) first_token_at_ = now;
    Clock::time_point& last = last_token_at_[static_cast<std::size_t>(event.choice)];
    if (last != Clock::time_point()) metrics_.observe_inter_token_latency(seconds(now - last));
    last = now;
  }
}

void RunningCompletion::on_tokens(std::span<const engine::TokenEvent> events) {
  for (const engine::TokenEvent& event : events) {
    CHECK(event.choice >= 0 && static_cast<std::size_t>(event.choice) < last_token_at_.size(),
          "the engine reported a choice that was not asked for");
  }
  observe_latencies(events);
  asio::post(executor_, [self = shared_from_this(), copy = std::vector<engine::TokenEvent>(
                                                        events.begin(), events.end())]() mutable {
    self->handle_tokens(std::move(copy));
  });
}

void RunningCompletion::on_prompt_scores(std::span<const engine::PromptScore> scores) {
  asio::post(executor_, [self = shared_from_this(), copy = std::vector<engine::PromptScore>(
                                                        scores.begin(), scores.end())]() mutable {
    self->handle_scores(std::move(copy));
  });
}

double RunningCompletion::decode_seconds() const {
  if (!first_token_at_) return 0;
  return seconds(*std::max_element(last_token_at_.begin(), last_token_at_.end()) -
                 *first_token_at_);
}

void RunningCompletion::on_end(const Status& status, const engine::RequestSummary& summary) {
  asio::post(executor_, [self = shared_from_this(), status, summary, decode = decode_seconds()] {
    self->handle_end(status, summary, decode);
  });
}

void RunningCompletion::handle_scores(std::vector<engine::PromptScore> scores) {
  if (!handle_) {
    before_handle_.emplace_back(
        [this, scores = std::move(scores)]() mutable { handle_scores(std::move(scores)); });
    return;
  }
  if (may_call_sink() && !scores.empty()) sink_->on_scores(std::move(scores));
}

void RunningCompletion::handle_tokens(std::vector<engine::TokenEvent> events) {
  if (!handle_) {
    before_handle_.emplace_back([this, events = std::move(events)] { handle_tokens(events); });
    return;
  }
  std::vector<OutputDelta> deltas;
  for (const engine::TokenEvent& event : events) {
    const bool broken = event.finish == engine::FinishReason::kCancelled ||
                        event.finish == engine::FinishReason::kFailed;
    ChoiceText& choice = choices_[static_cast<std::size_t>(event.choice)];
    if (broken || choice.finished()) continue;
    ++completion_tokens_;
    ++choice_tokens_[static_cast<std::size_t>(event.choice)];
    if (choice.push(event, delta_of_choice(deltas, event.choice))) {
      engine_.finish_choice(*handle_, event.choice);
    }
  }
  for (OutputDelta& delta : deltas) {
    if (has_output(delta) && may_call_sink()) sink_->on_delta(std::move(delta));
  }
}

void RunningCompletion::count_outcome(const Status& status, const engine::RequestSummary& summary,
                                      double decode_seconds) {
  for (const ChoiceText& choice : choices_) {
    using telemetry::FinishedReason;
    FinishedReason reason = status.ok() || status.code() == StatusCode::kCancelled
                                ? FinishedReason::kAbort
                                : FinishedReason::kError;
    if (choice.finish_reason() == engine::FinishReason::kStop) reason = FinishedReason::kStop;
    if (choice.finish_reason() == engine::FinishReason::kLength) reason = FinishedReason::kLength;
    metrics_.count_finished_choice(reason);
  }
  if (!status.ok()) return;
  telemetry::RequestTimes times;
  times.e2e_seconds = seconds(Clock::now() - arrival_);
  times.queue_seconds = summary.queue_ms / 1000.0;
  times.prefill_seconds = (summary.time_to_first_token_ms - summary.queue_ms) / 1000.0;
  times.decode_seconds = decode_seconds;
  times.prompt_tokens = summary.prompt_tokens;
  times.generation_tokens = summary.completion_tokens;
  times.longest_generation_tokens = *std::max_element(choice_tokens_.begin(), choice_tokens_.end());
  times.n_choices = static_cast<std::int64_t>(choices_.size());
  times.max_tokens = max_tokens_;
  metrics_.observe_request(times);
}

void RunningCompletion::handle_end(const Status& status, engine::RequestSummary summary,
                                   double decode_seconds) {
  if (!handle_) {
    before_handle_.emplace_back(
        [this, status, summary, decode_seconds] { handle_end(status, summary, decode_seconds); });
    return;
  }
  // Steps in flight when a stop string ended a choice may have sampled more; they are not output.
  summary.completion_tokens = completion_tokens_;
  summary.prompt_tokens = prompt_tokens_;
  count_outcome(status, summary, decode_seconds);
  if (!may_call_sink()) return;
  const bool complete = std::all_of(choices_.begin(), choices_.end(),
                                    [](const ChoiceText& choice) { return choice.finished(); });
  if (!status.ok()) {
    end_with({status});
  } else if (!complete) {
    end_with({internal_error("the engine ended a request with an unfinished choice")});
  } else {
    const std::shared_ptr<OutputSink> sink = std::move(sink_);
    sink_ = nullptr;
    sink->on_done(summary);
  }
}

}  // namespace spindle::api
