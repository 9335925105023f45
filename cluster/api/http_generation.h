#pragma once
// One chat or completion request of an HTTP client: collects the output of its prompts, as SSE
// bytes or as one body.

#include <boost/asio/any_io_executor.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/api/completion_service.h"
#include "cluster/api/openai_request.h"
#include "cluster/api/openai_response.h"

namespace spindle::api {

// Between the completions, which push, and the session's writer, which pulls when its socket is
// ready. A slow reader costs bounded memory: beyond max_buffered_bytes of events, further deltas
// are merged (a token then takes its text instead of an event of some 200 bytes), and beyond as
// much merged output the request is cancelled and overflowed() says so.
//
// The completions keep it alive until they end. Thread-safety: none; everything happens on the
// executor given to start.
class HttpGeneration : public std::enable_shared_from_this<HttpGeneration> {
 public:
  // `wake` is called after every change, on the executor; it must not destroy this object.
  HttpGeneration(OpenAiRequest request, OpenAiWriter writer, std::size_t max_buffered_bytes,
                 std::function<void()> wake);

  void start(CompletionService& service, const boost::asio::any_io_executor& executor);
  // Cancels what runs; wake is not called any more.
  void abandon();

  // All prompts are queued: a streamed response may begin.
  bool accepted() const { return n_accepted_ == prompts_.size(); }
  bool finished() const { return error_.has_value() || n_done_ == prompts_.size(); }
  const std::optional<ApiError>& error() const { return error_; }
  bool overflowed() const { return overflowed_; }
  bool stream() const { return request_.stream; }

  // SSE bytes to send next; empty when there are none yet. Once finished() and empty, all is sent.
  std::string take_events();
  // The whole response, once finished without an error and not streamed.
  std::string body();

 private:
  class PromptSink;
  struct PromptState {
    std::shared_ptr<Completion> completion;
    bool done = false;
  };

  void prompt_accepted(std::size_t prompt, std::int32_t prompt_tokens);
  void prompt_delta(std::size_t prompt, OutputDelta delta);
  void prompt_done(std::size_t prompt, const engine::RequestSummary& summary);
  void prompt_failed(std::size_t prompt, const ApiError& error);
  void hold(OutputDelta delta);
  void fail(ApiError error);
  void write_held();
  void write_end();
  void cancel_all();
  void wake() const {
    if (wake_) wake_();
  }
  std::int32_t n_per_prompt() const { return request_.n; }

  OpenAiRequest request_;
  OpenAiWriter writer_;
  const std::size_t max_buffered_bytes_;
  std::function<void()> wake_;
  std::vector<PromptState> prompts_;
  std::size_t n_accepted_ = 0;
  std::size_t n_done_ = 0;
  std::optional<ApiError> error_;
  bool overflowed_ = false;
  bool end_written_ = false;
  UsageCounts usage_;
  std::string events_;
  // Streamed: deltas that wait for room in events_. Otherwise: the whole output. One per choice.
  std::vector<OutputDelta> held_;
  std::size_t held_bytes_ = 0;
};

}  // namespace spindle::api
