#include "cluster/coordinator/simulation/request_book.h"

#include <algorithm>

namespace spindle::coordinator::simulation {
namespace {

Status wrong(std::uint64_t handle, const std::string& what) {
  return internal_error("request " + std::to_string(handle) + ": " + what);
}

// Reasons that lie in what the request asked for.
bool may_be_refused_late(const engine::EngineRequest& request, StatusCode code) {
  const bool has_policy = request.kv_policy.profile != kvstore::KvProfile::kFull ||
                          !request.kv_policy.overrides.empty();
  if (code == StatusCode::kInvalidArgument) return has_policy || !request.session_id.empty();
  return (code == StatusCode::kResourceExhausted || code == StatusCode::kNotFound) &&
         !request.session_id.empty();
}

}  // namespace

RequestBook::RequestBook(const SchedulerConfig& config, const TokenModel& model)
    : seed_(config.seed),
      eos_ids_(config.eos_token_ids),
      max_model_len_(config.limits.max_model_len),
      model_(model) {}

Life* RequestBook::find(engine::RequestHandle handle) {
  const auto found = lives_.find(handle);
  return found == lives_.end() ? nullptr : &found->second;
}

bool RequestBook::is_stop(const Life& life, std::int32_t token) const {
  const engine::SamplingParams& sampling = life.request.sampling;
  const auto has = [token](const std::vector<std::int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  return has(sampling.stop_token_ids) || (!sampling.ignore_eos && has(eos_ids_));
}

std::int32_t RequestBook::expected_token(const Life& life, const Life::Choice& choice) const {
  return next_token(model_, choice.hash, choice.key,
                    life.request.resumed_tokens + static_cast<std::int64_t>(choice.output.size()));
}

Life& RequestBook::accept(engine::RequestHandle handle, engine::EngineRequest request,
                          std::int64_t now_us) {
  Life& life = lives_[handle];
  ++n_open_;
  life.request = std::move(request);
  life.submitted_us = now_us;
  const engine::SamplingParams& sampling = life.request.sampling;
  const auto n_prompt = static_cast<std::int64_t>(life.request.prompt_ids.size());
  life.max_generated = std::min<std::int64_t>(sampling.max_tokens, max_model_len_ - n_prompt);
  SamplingKey key;
  key.seed = sampling.has_seed ? sampling.seed : seed_;
  key.request = sampling.has_seed ? 0 : handle;
  key.min_tokens = sampling.min_tokens;
  if (sampling.min_tokens > 0) {
    key.banned_before_min = sampling.stop_token_ids;
    if (!sampling.ignore_eos) {
      key.banned_before_min.insert(key.banned_before_min.end(), eos_ids_.begin(), eos_ids_.end());
    }
  }
  const std::uint64_t hash = append(kEmptySequence, life.request.prompt_ids);
  for (std::int32_t i = 0; i < sampling.n_choices; ++i) {
    key.choice = i;
    life.choices.push_back({key, hash, {}, false});
  }
  return life;
}

std::int64_t RequestBook::work(const Life& life) const {
  auto tokens = static_cast<std::int64_t>(life.request.prompt_ids.size());
  for (const Life::Choice& begun : life.choices) {
    std::uint64_t hash = begun.hash;
    for (std::int64_t i = 0; i < life.max_generated; ++i) {
      const std::int32_t token =
          next_token(model_, hash, begun.key, life.request.resumed_tokens + i);
      ++tokens;
      if (is_stop(life, token)) break;
      hash = append(hash, token);
    }
  }
  return tokens;
}

void RequestBook::cancel(engine::RequestHandle handle) {
  if (Life* life = find(handle); life != nullptr && life->n_ended == 0) life->is_cancelled = true;
}

void RequestBook::finish_choice(engine::RequestHandle handle, std::int32_t choice) {
  Life* life = find(handle);
  if (life == nullptr || choice < 0 || choice >= static_cast<std::int32_t>(life->choices.size())) {
    return;
  }
  Life::Choice& finished = life->choices[static_cast<std::size_t>(choice)];
  if (!finished.output.empty()) finished.is_finished = true;
}

Status RequestBook::take_token(Life& life, const engine::TokenEvent& event) const {
  if (event.choice < 0 || event.choice >= static_cast<std::int32_t>(life.choices.size())) {
    return internal_error("a token of choice " + std::to_string(event.choice));
  }
  Life::Choice& choice = life.choices[static_cast<std::size_t>(event.choice)];
  if (choice.is_finished) return internal_error("a token after a choice's last");
  const std::int32_t expected = expected_token(life, choice);
  if (event.token != expected) {
    return internal_error("token " + std::to_string(choice.output.size()) + " of choice " +
                          std::to_string(event.choice) + " is " + std::to_string(event.token) +
                          " and should be " + std::to_string(expected));
  }
  choice.output.push_back(event.token);
  choice.hash = append(choice.hash, event.token);
  engine::FinishReason finish = engine::FinishReason::kNone;
  if (is_stop(life, event.token)) {
    finish = engine::FinishReason::kStop;
  } else if (static_cast<std::int64_t>(choice.output.size()) >= life.max_generated) {
    finish = engine::FinishReason::kLength;
  }
  if (event.finish != finish || event.is_stop_token != (finish == engine::FinishReason::kStop)) {
    return internal_error("token " + std::to_string(choice.output.size()) + " of choice " +
                          std::to_string(event.choice) + " ends it, or should");
  }
  choice.is_finished = finish != engine::FinishReason::kNone;
  return ok_status();
}

Status RequestBook::take_scores(Life& life, const RequestEvents& events) const {
  const engine::PromptScores& wanted = life.request.prompt_scores;
  for (const engine::PromptScore& score : events.scores) {
    const auto position = wanted.first + static_cast<std::int32_t>(life.n_scores++);
    if (score.position != position || position >= wanted.end) {
      return internal_error("the score of position " + std::to_string(score.position) +
                            " comes instead of " + std::to_string(position));
    }
  }
  return ok_status();
}

Status RequestBook::take(const RequestEvents& events, std::int64_t now_us) {
  Life* life = find(events.request);
  if (life == nullptr) return wrong(events.request, "events of a request that nobody made");
  if (life->n_ended > 0) return wrong(events.request, "an event after its end");
  Status status = take_scores(*life, events);
  for (std::size_t i = 0; i < events.tokens.size() && status.ok(); ++i) {
    status = take_token(*life, events.tokens[i]);
  }
  if (status.ok() && events.ended) {
    ++life->n_ended;
    --n_open_;
    life->ended_us = now_us;
    life->status = events.status;
    life->summary = events.summary;
    status = check_end(*life);
  }
  if (!status.ok()) return wrong(events.request, status.message());
  return ok_status();
}

Status RequestBook::check_end(const Life& life) const {
  std::int64_t n_tokens = 0;
  for (const Life::Choice& choice : life.choices) {
    n_tokens += static_cast<std::int64_t>(choice.output.size());
  }
  if (life.summary.completion_tokens != n_tokens ||
      life.summary.prompt_tokens != static_cast<std::int32_t>(life.request.prompt_ids.size())) {
    return internal_error("its summary counts " + std::to_string(life.summary.completion_tokens) +
                          " tokens, " + std::to_string(n_tokens) + " came");
  }
  const StatusCode code = life.status.code();
  if (!life.status.ok()) {
    if (code == StatusCode::kCancelled && life.is_cancelled) return ok_status();
    if (code == StatusCode::kDeadlineExceeded && life.request.timeout_us > 0 &&
        life.ended_us >= life.submitted_us + life.request.timeout_us) {
      return ok_status();
    }
    if (code == failure_ || may_be_refused_late(life.request, code)) return ok_status();
    return internal_error("nobody gave it a reason to end with " + life.status.to_string());
  }
  const engine::PromptScores& wanted = life.request.prompt_scores;
  if (static_cast<std::int32_t>(life.n_scores) != wanted.end - wanted.first) {
    return internal_error("scores of its prompt are missing");
  }
  for (const Life::Choice& choice : life.choices) {
    if (!choice.is_finished) return internal_error("it ends before a choice's last token");
  }
  return ok_status();
}

Status RequestBook::end_failed(engine::RequestHandle handle, const Status& status,
                               std::int64_t now_us) {
  Life* life = find(handle);
  if (life == nullptr || life->n_ended > 0) return wrong(handle, "ended twice");
  ++life->n_ended;
  --n_open_;
  life->ended_us = now_us;
  life->status = status;
  return ok_status();
}

Status RequestBook::check_all_ended() const {
  for (const auto& [handle, life] : lives_) {
    if (life.n_ended != 1) {
      return wrong(handle, "it ended " + std::to_string(life.n_ended) + " times");
    }
  }
  return ok_status();
}

}  // namespace spindle::coordinator::simulation
