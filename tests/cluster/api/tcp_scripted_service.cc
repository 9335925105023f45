#include "tests/cluster/api/tcp_scripted_service.h"

#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

namespace spindle::api {
namespace {

std::vector<std::string> words_of(const std::string& text) {
  std::vector<std::string> words;
  std::string word;
  for (const char c : text) {
    word += c;
    if (c == ' ' || c == '\n') words.push_back(std::exchange(word, {}));
  }
  if (!word.empty()) words.push_back(word);
  return words;
}

std::string text_of(const GenerateRequest& request) {
  if (const auto* text = std::get_if<std::string>(&request.prompt)) return *text;
  if (const auto* ids = std::get_if<std::vector<std::int32_t>>(&request.prompt)) {
    std::ostringstream text;
    for (const std::int32_t id : *ids) text << id << ' ';
    return text.str();
  }
  const boost::json::array& messages = std::get<ChatPrompt>(request.prompt).messages;
  if (messages.empty()) return "";
  const auto content = messages.back().at("content").as_string();
  const std::string last(content.begin(), content.end());
  for (const char* word : {"slow", "fail", "refuse"}) {
    if (last.starts_with(word)) return last;
  }
  return std::to_string(messages.size()) + ": " + last;
}

std::string policy_text(const GenerateRequest& request) {
  const KvPolicyRequest policy = request.kv_policy.value_or(KvPolicyRequest());
  std::ostringstream text;
  text << policy.profile << ' ' << policy.ratio.value_or(0) << ' ' << policy.max_bytes.value_or(0)
       << ' ' << request.session_id << (request.keep_session ? " keep" : "");
  return text.str();
}

}  // namespace

class ScriptedService::Run : public Completion, public std::enable_shared_from_this<Run> {
 public:
  Run(ScriptedService& service, const GenerateRequest& request,
      const boost::asio::any_io_executor& executor, std::shared_ptr<OutputSink> sink)
      : service_(service),
        executor_(executor),
        sink_(std::move(sink)),
        timer_(executor),
        words_(words_of(text_of(request))),
        n_choices_(static_cast<std::int32_t>(request.sampling.n.value_or(1))),
        max_tokens_(static_cast<std::size_t>(request.sampling.max_tokens.value_or(1'000'000))),
        logprobs_(request.sampling.logprobs.has_value()),
        policy_(policy_text(request)),
        session_id_(request.session_id),
        prompt_scores_(request.prompt_scores) {}

  void begin() {
    boost::asio::post(executor_, [self = shared_from_this()] { self->first(); });
  }

  void cancel() override {
    boost::asio::post(executor_, [self = shared_from_this()] {
      self->fail({cancelled("cancelled")}, &ScriptedCounts::cancelled);
    });
  }

 private:
  void first() {
    if (ended_) return;
    mode_ = words_.empty() ? "" : words_.front();
    while (!mode_.empty() && mode_.back() == ' ') mode_.pop_back();
    if (mode_ == "refuse") {
      fail({resource_exhausted("the queue is full"), "", 250}, &ScriptedCounts::errors);
      return;
    }
    if (mode_ == "invalid") {
      fail({invalid_argument("top_p must be in (0, 1], got 2"), "top_p"}, &ScriptedCounts::errors);
      return;
    }
    sink_->on_accepted(static_cast<std::int32_t>(words_.size()));
    if (prompt_scores_) send_scores();
    if (mode_ != "silent") step();
  }

  void send_scores() {
    std::vector<engine::PromptScore> scores;
    for (std::int64_t position = prompt_scores_->first; position < prompt_scores_->end;
         ++position) {
      engine::PromptScore& score = scores.emplace_back();
      score.position = static_cast<std::int32_t>(position);
      score.logprob = -1.0F;
      if (prompt_scores_->dense) score.dense.assign(4096, -2.0F);
    }
    sink_->on_scores(std::move(scores));
  }

  void step() {
    if (ended_) return;
    if (mode_ == "flood") {
      OutputDelta delta;
      delta.text = std::string(4096, 'f');
      sink_->on_delta(std::move(delta));
      boost::asio::post(executor_, [self = shared_from_this()] { self->step(); });
      return;
    }
    if (mode_ == "slow") {
      emit("word ");
      if (position_ == max_tokens_) {
        finish();
        return;
      }
      timer_.expires_after(std::chrono::milliseconds(10));
      timer_.async_wait([self = shared_from_this()](const auto& error) {
        if (!error) self->step();
      });
      return;
    }
    if (mode_ == "fail") {
      emit("partial ");
      fail({internal_error("a stage failed")}, &ScriptedCounts::errors);
      return;
    }
    if (mode_ == "policy") {
      emit(policy_);
      finish();
      return;
    }
    if (mode_ == "escape") {
      emit(
          "\x1b[31mred\x07 \xC2\x9B"
          "31m end\n");
      finish();
      return;
    }
    if (position_ >= std::min(words_.size(), max_tokens_)) {
      finish();
      return;
    }
    emit(words_[position_]);
    boost::asio::post(executor_, [self = shared_from_this()] { self->step(); });
  }

  void emit(const std::string& word) {
    const auto token = static_cast<std::int32_t>(position_++);
    for (std::int32_t choice = 0; choice < n_choices_; ++choice) {
      OutputDelta delta;
      delta.choice = choice;
      delta.text = word;
      delta.token_ids = {token};
      if (logprobs_) {
        delta.logprobs = {{.chosen = {token, word, -0.5F}, .top = {{token, word, -0.5F}}}};
      }
      sink_->on_delta(std::move(delta));
      ++n_tokens_;
    }
  }

  void finish() {
    ended_ = true;
    const bool cut = position_ == max_tokens_;
    for (std::int32_t choice = 0; choice < n_choices_; ++choice) {
      OutputDelta delta;
      delta.choice = choice;
      delta.finish = cut ? engine::FinishReason::kLength : engine::FinishReason::kStop;
      delta.stop_reason = cut ? "" : "2";
      sink_->on_delta(std::move(delta));
    }
    engine::RequestSummary summary;
    summary.prompt_tokens = static_cast<std::int32_t>(words_.size());
    summary.completion_tokens = n_tokens_;
    summary.queue_ms = 1;
    summary.time_to_first_token_ms = 20;
    summary.total_ms = 120;
    summary.kv = {
        {.stage = 0,
         .full_bytes = 4096,
         .kept_bytes = 1024,
         .layers = {{0, 2048, 1016}, {1, 2048, 8}}},
        {.stage = 1, .full_bytes = 4096, .kept_bytes = 1024, .layers = {{2, 4096, 1024}}}};
    if (!session_id_.empty()) summary.cached_tokens = 1;
    service_.count(&ScriptedCounts::done);
    sink_->on_done(summary);
  }

  void fail(const ApiError& error, int ScriptedCounts::*counter) {
    if (std::exchange(ended_, true)) return;
    timer_.cancel();
    service_.count(counter);
    sink_->on_error(error);
  }

  ScriptedService& service_;
  const boost::asio::any_io_executor executor_;
  const std::shared_ptr<OutputSink> sink_;
  boost::asio::steady_timer timer_;
  const std::vector<std::string> words_;
  const std::int32_t n_choices_;
  const std::size_t max_tokens_;
  const bool logprobs_;
  const std::string policy_;
  const std::string session_id_;
  const std::optional<PromptScoresRequest> prompt_scores_;
  std::string mode_;
  std::size_t position_ = 0;
  std::int32_t n_tokens_ = 0;
  bool ended_ = false;
};

TcpServerHooks ScriptedService::hooks() {
  TcpServerHooks hooks;
  hooks.start = [this](GenerateRequest request, boost::asio::any_io_executor executor,
                       std::shared_ptr<OutputSink> sink) {
    return start(std::move(request), std::move(executor), std::move(sink));
  };
  hooks.stats = [this] { return stats(); };
  hooks.drain = [this] {
    count(&ScriptedCounts::drains);
    return stats().running;
  };
  return hooks;
}

std::shared_ptr<Completion> ScriptedService::start(GenerateRequest request,
                                                   boost::asio::any_io_executor executor,
                                                   std::shared_ptr<OutputSink> sink) {
  auto run = std::make_shared<Run>(*this, request, executor, std::move(sink));
  {
    const std::lock_guard lock(mutex_);
    requests_.push_back(std::move(request));
  }
  count(&ScriptedCounts::started);
  run->begin();
  return run;
}

void ScriptedService::count(int ScriptedCounts::*counter) {
  const std::lock_guard lock(mutex_);
  ++(counts_.*counter);
  changed_.notify_all();
}

ScriptedCounts ScriptedService::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

bool ScriptedService::wait_until(const std::function<bool(const ScriptedCounts&)>& reached) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return reached(counts_); });
}

std::vector<GenerateRequest> ScriptedService::requests() const {
  const std::lock_guard lock(mutex_);
  return requests_;
}

engine::EngineStats ScriptedService::stats() const {
  const ScriptedCounts now = counts();
  engine::EngineStats stats;
  stats.running = now.started - now.done - now.errors - now.cancelled;
  stats.accepted = static_cast<std::uint64_t>(now.started);
  stats.finished = static_cast<std::uint64_t>(now.done);
  stats.failed = static_cast<std::uint64_t>(now.errors);
  stats.cancelled = static_cast<std::uint64_t>(now.cancelled);
  stats.draining = now.drains > 0;
  for (std::int32_t stage = 0; stage < 2; ++stage) {
    engine::StageState state;
    state.stage = stage;
    state.host = "node";
    state.device = "cpu";
    state.first_layer = stage * 2;
    state.n_layers = 2;
    state.weight_bytes = 3U << 20U;
    state.kv_capacity_bytes = 64U << 20U;
    state.kv_used_bytes = 16U << 20U;
    state.kv_peak_bytes = 32U << 20U;
    state.layers.resize(2);
    state.layers[0].layer = state.first_layer;
    state.layers[0].used_bytes = 12U << 20U;
    state.layers[1].layer = state.first_layer + 1;
    state.layers[1].used_bytes = 4U << 20U;
    state.steps = 10;
    state.busy_seconds = 0.5;
    stats.stages.push_back(state);
  }
  return stats;
}

}  // namespace spindle::api
