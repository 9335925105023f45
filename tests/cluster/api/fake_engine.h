#pragma once
// An engine that generates scripted tokens: for tests of the front end without a model.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cluster/engine/engine.h"
#include "kernels/core/deadline.h"

namespace spindle::api {

// The score of a prompt token: recognisable by its position.
engine::PromptScore fake_score(std::int32_t position, bool dense, std::int32_t vocab_size);

// What a request generates, the same for every choice. Scores of its prompt, if it wants them, come
// first, some at a time. After the last token comes the
// end-of-sequence token, or, with ignore_eos, the first token again.
struct FakeScript {
  std::vector<std::int32_t> tokens;
  std::chrono::microseconds first_delay{0};
  std::chrono::microseconds token_delay{0};
  // The request fails with `failure` after so many tokens.
  std::size_t fail_after = std::numeric_limits<std::size_t>::max();
  Status failure;
  // What on_end adds to the counts: KV, cached tokens, boundaries.
  engine::RequestSummary summary{};
};

// One thread sends all events. Thread-safety: every member may be called from any thread.
class FakeEngine final : public engine::Engine {
 public:
  static constexpr std::int32_t kEos = 2;
  using ScriptFor = std::function<FakeScript(const engine::EngineRequest&)>;

  FakeEngine(engine::EngineLimits limits, ScriptFor script_for);
  // Cancels what runs.
  ~FakeEngine() override;

  Result<engine::RequestHandle> submit(engine::EngineRequest request,
                                       std::shared_ptr<engine::EventSink> sink) override;
  bool cancel(engine::RequestHandle handle) override;
  void finish_choice(engine::RequestHandle handle, std::int32_t choice) override;
  engine::EngineStats stats() const override;
  // With one move and the requests under way.
  engine::EngineSnapshot snapshot() const override;
  const engine::EngineLimits& limits() const override { return limits_; }
  Status admission() const override;

  // What admission() and submit() say from now on.
  void set_admission(Status status);
  void set_submit(Status status);
  void set_draining(bool draining);
  // Refuses requests beyond so many at a time with RESOURCE_EXHAUSTED.
  void set_capacity(std::size_t n_requests);

  // All requests so far, as submitted.
  std::vector<engine::EngineRequest> submitted() const;
  std::size_t n_finished_choices() const;  // by finish_choice
  // Whether `condition` became true of the stats in time.
  bool wait_for(const std::function<bool(const engine::EngineStats&)>& condition,
                Deadline deadline) const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Choice {
    std::size_t n_generated = 0;
    bool finished = false;
  };
  struct Active {
    engine::EngineRequest request;
    std::shared_ptr<engine::EventSink> sink;
    FakeScript script;
    std::vector<Choice> choices;
    Clock::time_point due;
    bool cancelled = false;
    bool scored = false;
    std::int32_t completion_tokens = 0;
  };

  void run();
  // Sends the scores that the prompt's positions ask for.
  void send_scores(const engine::EngineRequest& request, engine::EventSink& sink) const;
  // Under the lock: the next events of a request, and how it ends, if it does.
  std::vector<engine::TokenEvent> step(Active& active);
  engine::TokenEvent next_event(const Active& active, Choice& choice, std::int32_t index) const;
  static bool is_over(const Active& active);
  Status outcome(const Active& active);
  void end(std::map<engine::RequestHandle, Active>::iterator it,
           std::unique_lock<std::mutex>& lock);

  const engine::EngineLimits limits_;
  const ScriptFor script_for_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<engine::RequestHandle, Active> active_;
  std::vector<engine::EngineRequest> submitted_;
  engine::EngineStats stats_;
  Status admission_;
  Status submit_;
  std::size_t capacity_ = std::numeric_limits<std::size_t>::max();
  std::size_t n_finished_choices_ = 0;
  engine::RequestHandle next_handle_ = 1;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace spindle::api
