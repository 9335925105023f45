#include "tests/cluster/api/fake_engine.h"

#include <algorithm>
#include <utility>

namespace spindle::api {

engine::PromptScore fake_score(std::int32_t position, bool dense, std::int32_t vocab_size) {
  engine::PromptScore score;
  score.position = position;
  score.logprob = -static_cast<float>(position);
  score.best_id = position % vocab_size;
  score.best_logprob = -0.5F;
  for (std::int32_t id = 0; dense && id < vocab_size; ++id) {
    score.dense.push_back(-static_cast<float>(id + position));
  }
  return score;
}

FakeEngine::FakeEngine(engine::EngineLimits limits, ScriptFor script_for)
    : limits_(limits), script_for_(std::move(script_for)) {
  engine::StageState stage;
  stage.host = "test-host";
  stage.device = "cpu";
  stage.n_layers = 2;
  stage.weight_bytes = 1000;
  stage.kv_capacity_bytes = 1 << 20;
  stage.kv_used_bytes = 300;
  stage.kv_peak_bytes = 500;
  stage.bubble = {0.25, 0.5, 0.125};
  stage.send_seconds = 0.5;
  stage.receive_seconds = 0.25;
  stage.compress_seconds = 2;
  stage.layers = {{0, 100, 400, "EVICT lloyd4", 50, 20}, {1, 200, 400, "FULL raw", 50, 50}};
  stats_.stages = {stage, stage};
  stats_.stages[1].stage = 1;
  stats_.stages[1].first_layer = 2;
  for (engine::LayerState& layer : stats_.stages[1].layers) layer.layer += 2;
  thread_ = std::thread([this] { run(); });
}

FakeEngine::~FakeEngine() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

Result<engine::RequestHandle> FakeEngine::submit(engine::EngineRequest request,
                                                 std::shared_ptr<engine::EventSink> sink) {
  const std::lock_guard lock(mutex_);
  if (!submit_.ok() || active_.size() >= capacity_) {
    ++stats_.refused;
    return submit_.ok() ? resource_exhausted("the queue is full") : submit_;
  }
  const engine::RequestHandle handle = next_handle_++;
  Active active;
  active.script = script_for_(request);
  active.choices.resize(static_cast<std::size_t>(request.sampling.n_choices));
  active.due = Clock::now() + active.script.first_delay;
  active.sink = std::move(sink);
  submitted_.push_back(request);
  active.request = std::move(request);
  ++stats_.accepted;
  ++stats_.running;
  stats_.prompt_tokens += active.request.prompt_ids.size();
  active_.emplace(handle, std::move(active));
  changed_.notify_all();
  return handle;
}

bool FakeEngine::cancel(engine::RequestHandle handle) {
  const std::lock_guard lock(mutex_);
  const auto it = active_.find(handle);
  if (it == active_.end()) return false;
  it->second.cancelled = true;
  it->second.due = Clock::now();
  changed_.notify_all();
  return true;
}

void FakeEngine::finish_choice(engine::RequestHandle handle, std::int32_t choice) {
  const std::lock_guard lock(mutex_);
  ++n_finished_choices_;
  const auto it = active_.find(handle);
  if (it == active_.end()) return;
  it->second.choices.at(static_cast<std::size_t>(choice)).finished = true;
  it->second.due = Clock::now();
  changed_.notify_all();
}

engine::EngineStats FakeEngine::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

engine::EngineSnapshot FakeEngine::snapshot() const {
  const std::lock_guard lock(mutex_);
  engine::EngineSnapshot snapshot;
  snapshot.stats = stats_;
  snapshot.moves.push_back({.unix_ms = 1700000000000,
                            .step = 120,
                            .stage = 1,
                            .from_ratio = 0.5,
                            .to_ratio = 0.25,
                            .reason = "9.0 requests should run together and 4.5 fit"});
  for (const auto& [handle, active] : active_) {
    if (snapshot.active_requests.size() == engine::kMaxActiveRequests) break;
    engine::ActiveRequest& shown = snapshot.active_requests.emplace_back();
    shown.handle = handle;
    shown.running = true;
    shown.priority = active.request.priority;
    shown.prompt_tokens = static_cast<std::int32_t>(active.request.prompt_ids.size());
    shown.prefilled_tokens = shown.prompt_tokens;
    shown.generated_tokens = active.completion_tokens;
    shown.max_tokens = active.request.sampling.max_tokens * active.request.sampling.n_choices;
    shown.policy = kvstore::profile_name(active.request.kv_policy.profile);
  }
  snapshot.n_active_requests = static_cast<std::int64_t>(active_.size());
  return snapshot;
}

Status FakeEngine::admission() const {
  const std::lock_guard lock(mutex_);
  if (!admission_.ok()) return admission_;
  return active_.size() >= capacity_ ? resource_exhausted("the queue is full") : ok_status();
}

void FakeEngine::set_admission(Status status) {
  const std::lock_guard lock(mutex_);
  admission_ = std::move(status);
}

void FakeEngine::set_submit(Status status) {
  const std::lock_guard lock(mutex_);
  submit_ = std::move(status);
}

void FakeEngine::set_draining(bool draining) {
  const std::lock_guard lock(mutex_);
  stats_.draining = draining;
  admission_ = draining ? unavailable("the server is draining") : ok_status();
}

void FakeEngine::set_capacity(std::size_t n_requests) {
  const std::lock_guard lock(mutex_);
  capacity_ = n_requests;
}

std::vector<engine::EngineRequest> FakeEngine::submitted() const {
  const std::lock_guard lock(mutex_);
  return submitted_;
}

std::size_t FakeEngine::n_finished_choices() const {
  const std::lock_guard lock(mutex_);
  return n_finished_choices_;
}

bool FakeEngine::wait_for(const std::function<bool(const engine::EngineStats&)>& condition,
                          Deadline deadline) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline.at(), [&] { return condition(stats_); });
}

engine::TokenEvent FakeEngine::next_event(const Active& active, Choice& choice,
                                          std::int32_t index) const {
  const engine::SamplingParams& sampling = active.request.sampling;
  const std::vector<std::int32_t>& tokens = active.script.tokens;
  const bool at_end = choice.n_generated >= tokens.size();
  engine::TokenEvent event;
  event.choice = index;
  event.token = tokens.empty() || (at_end && !sampling.ignore_eos)
                    ? kEos
                    : tokens[choice.n_generated % tokens.size()];
  ++choice.n_generated;
  const auto& stops = sampling.stop_token_ids;
  const bool is_stop = std::find(stops.begin(), stops.end(), event.token) != stops.end();
  event.is_stop_token = is_stop || (event.token == kEos && !sampling.ignore_eos);
  if (event.is_stop_token) {
    event.finish = engine::FinishReason::kStop;
  } else if (choice.n_generated >= static_cast<std::size_t>(sampling.max_tokens)) {
    event.finish = engine::FinishReason::kLength;
  }
  if (sampling.n_logprobs >= 0) {
    event.has_logprob = true;
    event.logprob = -0.5F;
    for (std::int32_t i = 0; i < sampling.n_logprobs; ++i) {
      event.top.push_back({(event.token + i) % limits_.vocab_size, -0.5F - static_cast<float>(i)});
    }
  }
  choice.finished = event.finish != engine::FinishReason::kNone;
  return event;
}

std::vector<engine::TokenEvent> FakeEngine::step(Active& active) {
  std::vector<engine::TokenEvent> events;
  for (std::size_t i = 0; i < active.choices.size(); ++i) {
    Choice& choice = active.choices[i];
    if (choice.finished || choice.n_generated >= active.script.fail_after) continue;
    events.push_back(next_event(active, choice, static_cast<std::int32_t>(i)));
    ++stats_.generation_tokens;
    ++active.completion_tokens;
  }
  ++stats_.steps;
  active.due += active.script.token_delay;
  return events;
}

bool FakeEngine::is_over(const Active& active) {
  return active.cancelled ||
         std::all_of(active.choices.begin(), active.choices.end(), [&](const Choice& choice) {
           return choice.finished || choice.n_generated >= active.script.fail_after;
         });
}

Status FakeEngine::outcome(const Active& active) {
  if (active.cancelled) {
    ++stats_.cancelled;
    return cancelled("the request was cancelled");
  }
  const bool finished = std::all_of(active.choices.begin(), active.choices.end(),
                                    [](const Choice& choice) { return choice.finished; });
  ++(finished ? stats_.finished : stats_.failed);
  return finished ? ok_status() : active.script.failure;
}

void FakeEngine::end(std::map<engine::RequestHandle, Active>::iterator it,
                     std::unique_lock<std::mutex>& lock) {
  Active active = std::move(it->second);
  active_.erase(it);
  const Status status = outcome(active);
  --stats_.running;
  engine::RequestSummary summary = std::move(active.script.summary);
  summary.prompt_tokens = static_cast<std::int32_t>(active.request.prompt_ids.size());
  summary.completion_tokens = active.completion_tokens;
  summary.queue_ms = 1;
  summary.time_to_first_token_ms = 2;
  changed_.notify_all();
  lock.unlock();
  active.sink->on_end(status, summary);
  active.sink.reset();
  lock.lock();
}

void FakeEngine::send_scores(const engine::EngineRequest& request, engine::EventSink& sink) const {
  constexpr std::int32_t kAtATime = 7;
  const engine::PromptScores& asked = request.prompt_scores;
  std::vector<engine::PromptScore> scores;
  for (std::int32_t position = asked.first; position < asked.end; ++position) {
    scores.push_back(fake_score(position, asked.dense, limits_.vocab_size));
    if (scores.size() == kAtATime || position + 1 == asked.end) {
      sink.on_prompt_scores(scores);
      scores.clear();
    }
  }
}

void FakeEngine::run() {
  std::unique_lock lock(mutex_);
  while (!stopping_ || !active_.empty()) {
    auto next = active_.begin();
    for (auto it = active_.begin(); it != active_.end(); ++it) {
      if (stopping_) it->second.cancelled = true;
      if (it->second.due < next->second.due) next = it;
    }
    if (next == active_.end()) {
      changed_.wait(lock);
      continue;
    }
    if (!stopping_ && next->second.due > Clock::now()) {
      const Clock::time_point due = next->second.due;
      changed_.wait_until(lock, due);
      continue;
    }
    if (!is_over(next->second)) {
      const engine::RequestHandle handle = next->first;
      const std::vector<engine::TokenEvent> events = step(next->second);
      changed_.notify_all();  // wait_for looks at the counters
      const std::shared_ptr<engine::EventSink> sink = next->second.sink;
      // Nobody else changes the request, and only this thread removes it.
      const engine::EngineRequest& request = next->second.request;
      const bool first = !std::exchange(next->second.scored, true);
      lock.unlock();
      if (first) send_scores(request, *sink);
      sink->on_tokens(events);
      lock.lock();
      next = active_.find(handle);
    }
    if (is_over(next->second)) end(next, lock);
  }
}

}  // namespace spindle::api
