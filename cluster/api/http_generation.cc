#include "cluster/api/http_generation.h"

#include <utility>

#include "cluster/api/openai_kv.h"

namespace spindle::api {
namespace asio = boost::asio;

namespace {

// A response that is not streamed is collected in memory first.
constexpr std::size_t kMaxCollectedBytes = std::size_t{64} << 20;

}  // namespace

class HttpGeneration::PromptSink final : public OutputSink {
 public:
  PromptSink(std::shared_ptr<HttpGeneration> owner, std::size_t prompt)
      : owner_(std::move(owner)), prompt_(prompt) {}

  void on_accepted(std::int32_t prompt_tokens) override {
    owner_->prompt_accepted(prompt_, prompt_tokens);
  }
  void on_delta(OutputDelta delta) override { owner_->prompt_delta(prompt_, std::move(delta)); }
  void on_done(const engine::RequestSummary& summary) override {
    owner_->prompt_done(prompt_, summary);
  }
  void on_error(const ApiError& error) override { owner_->prompt_failed(prompt_, error); }

 private:
  std::shared_ptr<HttpGeneration> owner_;
  std::size_t prompt_;
};

HttpGeneration::HttpGeneration(OpenAiRequest request, OpenAiWriter writer,
                               std::size_t max_buffered_bytes, std::function<void()> wake)
    : request_(std::move(request)),
      writer_(std::move(writer)),
      max_buffered_bytes_(max_buffered_bytes),
      wake_(std::move(wake)),
      prompts_(request_.prompts.size()),
      held_(request_.prompts.size() * static_cast<std::size_t>(request_.n)) {
  for (std::size_t i = 0; i < held_.size(); ++i) held_[i].choice = static_cast<std::int32_t>(i);
}

void HttpGeneration::start(CompletionService& service, const asio::any_io_executor& executor) {
  for (std::size_t i = 0; i < prompts_.size(); ++i) {
    prompts_[i].completion = service.start(std::move(request_.prompts[i]), executor,
                                           std::make_shared<PromptSink>(shared_from_this(), i));
  }
}

void HttpGeneration::abandon() {
  wake_ = nullptr;
  cancel_all();
}

void HttpGeneration::cancel_all() {
  for (PromptState& prompt : prompts_) {
    if (prompt.completion && !prompt.done) prompt.completion->cancel();
  }
}

void HttpGeneration::prompt_accepted(std::size_t prompt, std::int32_t prompt_tokens) {
  if (finished()) return;
  ++n_accepted_;
  usage_.prompt_tokens += prompt_tokens;
  if (request_.stream) {
    const auto first = static_cast<std::int32_t>(prompt) * n_per_prompt();
    for (std::int32_t i = 0; i < n_per_prompt(); ++i) writer_.append_role(events_, first + i);
  }
  wake();
}

void HttpGeneration::hold(OutputDelta delta) {
  held_bytes_ += delta_bytes(delta);
  merge_delta(held_[static_cast<std::size_t>(delta.choice)], std::move(delta));
}

void HttpGeneration::prompt_delta(std::size_t prompt, OutputDelta delta) {
  if (finished()) return;
  delta.choice += static_cast<std::int32_t>(prompt) * n_per_prompt();
  // Nobody reads ids here, and they would count as held memory.
  delta.token_ids.clear();
  if (!request_.stream) {
    hold(std::move(delta));
    if (held_bytes_ > kMaxCollectedBytes) {
      fail({too_large("the response is too large to be sent in one piece; stream it")});
    }
    return;
  }
  if (events_.size() < max_buffered_bytes_ && held_bytes_ == 0) {
    writer_.append_delta(events_, delta);
  } else {
    hold(std::move(delta));
    if (held_bytes_ > max_buffered_bytes_) {
      overflowed_ = true;
      fail({resource_exhausted("the client reads too slowly")});
      return;
    }
  }
  wake();
}

void HttpGeneration::prompt_done(std::size_t prompt, const engine::RequestSummary& summary) {
  if (finished()) return;
  prompts_[prompt].done = true;
  ++n_done_;
  usage_.completion_tokens += summary.completion_tokens;
  usage_.cached_tokens += summary.cached_tokens;
  add_kv_use(usage_.kv, summary.kv);
  wake();
}

void HttpGeneration::prompt_failed(std::size_t prompt, const ApiError& error) {
  prompts_[prompt].done = true;
  if (!finished()) fail(error);
}

void HttpGeneration::fail(ApiError error) {
  error_ = std::move(error);
  cancel_all();
  wake();
}

void HttpGeneration::write_held() {
  for (OutputDelta& delta : held_) {
    if (delta_bytes(delta) == 0 && delta.finish == engine::FinishReason::kNone) continue;
    writer_.append_delta(events_, delta);
    const std::int32_t choice = delta.choice;
    delta = OutputDelta();
    delta.choice = choice;
  }
  held_bytes_ = 0;
}

void HttpGeneration::write_end() {
  end_written_ = true;
  if (error_) {
    OpenAiWriter::append_error(events_, *error_);
  } else if (request_.include_usage) {
    writer_.append_usage(events_, usage_);
  }
  OpenAiWriter::append_done(events_);
}

std::string HttpGeneration::take_events() {
  write_held();
  if (finished() && !end_written_) write_end();
  return std::exchange(events_, {});
}

std::string HttpGeneration::body() { return writer_.body(held_, usage_); }

}  // namespace spindle::api
