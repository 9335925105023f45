#include "cluster/coordinator/scheduler.h"

#include <algorithm>
#include <string>

#include "cluster/coordinator/scheduler_state.h"

namespace spindle::coordinator {
namespace {

double elapsed_ms(std::int64_t from_us, std::int64_t to_us) {
  return from_us == 0 ? 0.0 : static_cast<double>(to_us - from_us) / 1000.0;
}

}  // namespace

Scheduler::Scheduler(SchedulerConfig config, KvLedger ledger)
    : config_(std::move(config)), ledger_(std::move(ledger)) {}

Scheduler::~Scheduler() = default;

Status Scheduler::admission() const {
  if (draining_) return unavailable("the server is draining and takes no new requests");
  // Those for which a place to run is free do not count: prompts that come at once wait for steps.
  const int n_places = std::max(config_.max_num_seqs - running_sequences_, 0);
  if (static_cast<std::int64_t>(waiting_.size()) >=
      std::int64_t{config_.max_num_queued_reqs} + n_places) {
    return resource_exhausted("the queue is full: " + std::to_string(waiting_.size()) +
                              " requests wait");
  }
  if (counters_.waiting_prompt_tokens >= config_.max_num_queued_tokens) {
    return resource_exhausted(
        "the queue is full: " + std::to_string(counters_.waiting_prompt_tokens) +
        " prompt tokens wait");
  }
  if (waiting_kv_bytes_ >= config_.max_queued_kv_bytes) {
    return resource_exhausted("the queue is full: requests that will take " +
                              std::to_string(waiting_kv_bytes_) + " bytes of KV wait");
  }
  return ok_status();
}

Result<engine::RequestHandle> Scheduler::submit(engine::EngineRequest request,
                                                std::int64_t now_us) {
  if (Status status = validate_request(request, config_.limits); !status.ok()) return status;
  auto entry = std::make_unique<Request>();
  entry->request = std::move(request);
  const engine::SamplingParams& sampling = entry->request.sampling;
  entry->max_generated = static_cast<std::int32_t>(std::min<std::int64_t>(
      sampling.max_tokens, config_.limits.max_model_len - entry->n_prompt()));
  if (sampling.n_choices > config_.max_num_seqs) {
    return invalid_argument("n must be at most max_num_seqs (" +
                            std::to_string(config_.max_num_seqs) + ")");
  }
  if (Status status = check_kv(*entry); !status.ok()) return status;
  if (Status status = check_session(entry->request); !status.ok()) return status;
  if (!ledger_.fits_alone(entry->demand())) {
    return invalid_argument("max_tokens: the prompt of " + std::to_string(entry->n_prompt()) +
                            " tokens with " + std::to_string(sampling.n_choices) +
                            " outputs of up to " + std::to_string(entry->max_generated) +
                            " tokens needs more KV memory than the cluster has");
  }
  if (Status status = admission(); !status.ok()) {
    ++counters_.refused;
    return status;
  }
  entry->handle = next_handle_++;
  if (entry->request.timeout_us > 0) {
    entry->deadline_us = now_us + entry->request.timeout_us;
    deadlines_.emplace(entry->deadline_us, entry->handle);
  }
  entry->submitted_us = now_us;
  entry->choices_left = sampling.n_choices;
  entry->stop_ids.insert(sampling.stop_token_ids.begin(), sampling.stop_token_ids.end());
  if (!sampling.ignore_eos) {
    entry->stop_ids.insert(config_.eos_token_ids.begin(), config_.eos_token_ids.end());
  }
  entry->summary.prompt_tokens = static_cast<std::int32_t>(entry->n_prompt());
  for (std::size_t stage = 0; stage < ledger_.stages().size(); ++stage) {
    entry->summary.kv.push_back({static_cast<std::int32_t>(stage), 0, 0, {}});
  }
  for (std::int32_t i = 0; i < sampling.n_choices; ++i) {
    Choice choice;
    choice.sequence = next_sequence_++;
    choice.index = i;
    entry->choices.push_back(choice);
    sequences_.emplace(choice.sequence, std::pair(entry.get(), static_cast<std::size_t>(i)));
  }
  ++counters_.accepted;
  const engine::RequestHandle handle = entry->handle;
  waiting_.owner_came(entry->request.owner);
  waiting_.push({.request = handle,
                 .owner = entry->request.owner,
                 .priority = entry->request.priority,
                 .work = entry->n_prompt()});
  count_waiting(*entry, 1);
  requests_.emplace(handle, std::move(entry));
  return handle;
}

// Comes to wait or waits no longer.
void Scheduler::count_waiting(Request& request, int sign) {
  counters_.waiting += sign;
  counters_.waiting_prompt_tokens += sign * request.n_prompt();
  if (sign < 0) {
    waiting_kv_bytes_ -= request.queued_bytes;
    return;
  }
  request.queued_bytes = ledger_.total_bytes(request.first_demand());
  waiting_kv_bytes_ += request.queued_bytes;
}

bool Scheduler::cancel(engine::RequestHandle request, std::int64_t now_us) {
  const auto found = requests_.find(request);
  if (found == requests_.end() || has_ended(*found->second)) return false;
  stop_request(*found->second, cancelled("the request was cancelled"), now_us);
  return true;
}

void Scheduler::finish_choice(engine::RequestHandle request, std::int32_t choice,
                              std::int64_t now_us) {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return;
  Request& entry = *found->second;
  if (choice < 0 || choice >= static_cast<std::int32_t>(entry.choices.size())) return;
  Choice& ended = entry.choices[static_cast<std::size_t>(choice)];
  // A choice without output cannot have met a stop string, and the first one may still be
  // prefilling; but one that was preempted has output.
  if (ended.state == Choice::State::kPrompt &&
      (entry.choices.size() > 1 || entry.summary.completion_tokens == 0)) {
    return;
  }
  std::erase(prefilling_, request);
  end_choice(entry, ended);
  end_if_complete(entry, now_us);
}

void Scheduler::fail_all(const Status& status, std::int64_t now_us) {
  std::vector<engine::RequestHandle> handles;
  handles.reserve(requests_.size());
  for (const auto& [handle, request] : requests_) handles.push_back(handle);
  std::sort(handles.begin(), handles.end());
  for (const engine::RequestHandle handle : handles) {
    stop_request(*requests_.at(handle), status, now_us);
  }
}

void Scheduler::stop_request(Request& request, const Status& status, std::int64_t now_us) {
  if (has_ended(request)) return;  // its KV is being freed
  Choice& first = request.choices.front();
  request.status = status;
  std::erase(prefilling_, request.handle);
  for (Choice& choice : request.choices) end_choice(request, choice);
  if (first.kept) {  // only a request that ends well is kept
    first.kept = false;
    free_choice(request, first);
  }
  end_if_complete(request, now_us);
}

void Scheduler::end_choice(Request& request, Choice& choice) {
  if (choice.state == Choice::State::kEnded) return;
  if (choice.state != Choice::State::kPrompt) --decoding_sequences_;
  // The last sampled token is in the cache only if it was sent to run.
  choice.n_cached =
      request.n_prompt() + choice.n_generated - (choice.state == Choice::State::kInFlight ? 0 : 1);
  choice.state = Choice::State::kEnded;
  --request.choices_left;
  if (request.admitted) {
    --running_sequences_;
    set_tokens_ahead(request, 0);
    set_preemptible(request, false);
  }
  choice.kept =
      choice.index == 0 && request.request.keep_session && request.status.ok() && choice.on_stages;
  if (choice.kept) return;
  choice.waits_for_forks = choice.index == 0 && request.at_boundary && request.choices_left > 0;
  if (!choice.waits_for_forks) free_choice(request, choice);
  if (request.choices_left == 0) free_waiting_choice(request);
}

void Scheduler::free_waiting_choice(Request& request) {
  Choice& first = request.choices.front();
  if (std::exchange(first.waits_for_forks, false)) free_choice(request, first);
}

void Scheduler::free_choice(Request& request, Choice& choice) {
  if (choice.on_stages && !choice.freed_by_run) {
    to_free_.push_back(choice.sequence);
    request.frees_pending += static_cast<std::int64_t>(ledger_.stages().size());
  }
  if (!request.admitted) return;
  give_back([&] { ledger_.release_choice(request.handle, choice.index); });
}

void Scheduler::end_if_complete(Request& request, std::int64_t now_us) {
  if (request.choices_left > 0 || request.frees_pending > 0) return;
  const bool is_kept = request.choices.front().kept;
  // What is kept is what the boundary leaves.
  if (is_kept && (request.at_boundary || request.compressions_pending > 0)) return;
  if (is_kept) keep_session(request, request.choices.front(), now_us);
  for (const Boundary& boundary : request.reported) {
    if (boundary.planned) request.summary.boundaries.push_back(boundary.use);
  }
  request.summary.cached_tokens = static_cast<std::int32_t>(request.n_cached);
  RequestEvents& events = events_of(request);
  events.ended = true;
  events.status = request.status;
  request.summary.queue_ms =
      elapsed_ms(request.submitted_us, request.started_us > 0 ? request.started_us : now_us);
  request.summary.time_to_first_token_ms =
      elapsed_ms(request.first_token_us == 0 ? 0 : request.submitted_us, request.first_token_us);
  request.summary.total_ms = elapsed_ms(request.submitted_us, now_us);
  events.summary = request.summary;

  if (request.admitted) {
    --counters_.running;
  } else {
    count_waiting(request, -1);
    waiting_.take(request.handle);
  }
  waiting_.owner_left(request.request.owner);
  if (request.deadline_us > 0) deadlines_.erase({request.deadline_us, request.handle});
  if (request.status.ok()) {
    ++counters_.finished;
  } else if (request.status.code() == StatusCode::kCancelled) {
    ++counters_.cancelled;
  } else {
    ++counters_.failed;
    counters_.expired += request.status.code() == StatusCode::kDeadlineExceeded ? 1 : 0;
  }
  for (const Choice& choice : request.choices) sequences_.erase(choice.sequence);
  requests_.erase(request.handle);  // `request` is gone from here on
}

RequestEvents& Scheduler::events_of(const Request& request) {
  const auto [found, is_new] = event_index_.try_emplace(request.handle, events_.size());
  if (is_new) {
    events_.emplace_back();
    events_.back().request = request.handle;
  }
  return events_[found->second];
}

std::vector<RequestEvents> Scheduler::take_events() {
  event_index_.clear();
  return std::exchange(events_, {});
}

bool Scheduler::idle() const { return requests_.empty() && in_flight_.empty(); }

std::optional<std::pair<std::int64_t, std::uint64_t>> Scheduler::oldest_step() const {
  if (in_flight_.empty()) return std::nullopt;
  return std::pair(in_flight_.begin()->second.sent_us, in_flight_.begin()->first);
}

engine::EngineStats Scheduler::stats() const {
  engine::EngineStats stats = counters_;
  stats.steps = next_step_ - 1;
  stats.max_num_seqs = config_.max_num_seqs;
  stats.micro_batches_in_flight = in_flight();
  stats.draining = draining_;
  add_budget(stats);
  return stats;
}

bool Scheduler::has_ended(const Request& request) {
  return request.choices_left == 0 && !request.choices.front().kept;
}

Status Scheduler::on_result(const control::StepResult& result, std::int64_t now_us) {
  if (!result.error().empty()) {
    return internal_error("stage " + std::to_string(result.stage()) + " failed at step " +
                          std::to_string(result.step()) + ": " + result.error());
  }
  const auto found = in_flight_.find(result.step());
  const auto stage = static_cast<std::size_t>(result.stage());
  if (found == in_flight_.end() || result.stage() < 0 || stage >= ledger_.stages().size() ||
      found->second.reported[stage]) {
    return internal_error("stage " + std::to_string(result.stage()) + " sent a result for step " +
                          std::to_string(result.step()) + " that is not expected");
  }
  found->second.reported[stage] = true;
  if (Status status = check_pages(result, stage, found->second); !status.ok()) return status;
  for (const control::CompressedSequence& compressed : result.compressed()) {
    on_compressed(compressed, result.step(), stage, now_us);
  }
  for (const control::GrownSequence& grown : result.grown()) {
    on_grown(grown, result.step(), stage);
  }
  for (const control::PromptScore& score : result.prompt_scores()) on_prompt_score(score);
  for (const control::Sampled& sampled : result.sampled()) on_sampled(sampled, now_us);
  for (const control::BoundaryScores& scores : result.boundary_scores()) {
    if (Status status = on_boundary_scores(scores, stage, now_us); !status.ok()) return status;
  }
  for (const control::FreedSequence& freed : result.freed()) on_freed(freed, stage, now_us);
  const std::vector<bool>& reported = found->second.reported;
  if (std::find(reported.begin(), reported.end(), false) == reported.end()) {
    in_flight_.erase(found);
  }
  return ok_status();
}

// What a stage holds and has promised is what the ledger says, or less where a stage's projection
// is still on its way; more means that one of the two is wrong, and that a sequence may run out.
Status Scheduler::check_pages(const control::StepResult& result, std::size_t stage,
                              const Step& step) const {
  const std::int64_t pages = result.used_pages() + result.reserved_pages();
  if (pages <= step.committed[stage]) return ok_status();
  return internal_error("stage " + std::to_string(stage) + " holds and has promised " +
                        std::to_string(pages) + " KV pages after step " +
                        std::to_string(result.step()) + ", the ledger has " +
                        std::to_string(step.committed[stage]));
}

engine::FinishReason Scheduler::finish_reason(const Request& request, const Choice& choice,
                                              std::int32_t token) const {
  if (request.stop_ids.contains(token)) return engine::FinishReason::kStop;
  if (choice.n_generated >= request.max_generated) return engine::FinishReason::kLength;
  return engine::FinishReason::kNone;
}

void Scheduler::on_sampled(const control::Sampled& sampled, std::int64_t now_us) {
  const auto found = sequences_.find(sampled.sequence());
  if (found == sequences_.end()) return;  // ended, and its KV is freed
  Request& request = *found->second.first;
  Choice& choice = request.choices[found->second.second];
  if (choice.state == Choice::State::kEnded) return;
  if (sampled.token() < 0) {
    stop_request(request,
                 internal_error("the model gave no finite probability; the output is not usable"),
                 now_us);
    return;
  }
  if (request.first_token_us == 0) {
    request.first_token_us = now_us;
    counters_.completed_prompt_tokens += static_cast<std::uint64_t>(request.n_before_output());
  }
  if (choice.state == Choice::State::kPrompt) {
    ++decoding_sequences_;
    if (!choice.on_stages) to_fork_.push_back(choice.sequence);
  }
  ++choice.n_generated;
  ++request.summary.completion_tokens;
  ++counters_.generation_tokens;
  choice.next_token = sampled.token();
  choice.generated.push_back(sampled.token());
  choice.state = request.at_boundary ? Choice::State::kHeld : Choice::State::kReady;

  engine::TokenEvent event;
  event.choice = choice.index;
  event.token = sampled.token();
  event.has_logprob = request.request.sampling.n_logprobs >= 0;
  event.logprob = sampled.logprob();
  for (const control::TopLogprob& top : sampled.top())
    event.top.push_back({top.id(), top.logprob()});
  event.finish = finish_reason(request, choice, sampled.token());
  event.is_stop_token = request.stop_ids.contains(sampled.token());
  const bool ends = event.finish != engine::FinishReason::kNone;
  events_of(request).tokens.push_back(std::move(event));
  if (!ends) {
    if (!request.at_boundary) ready_.push_back(choice.sequence);
    return;
  }
  end_choice(request, choice);
  end_if_complete(request, now_us);
}

void Scheduler::on_freed(const control::FreedSequence& freed, std::size_t stage,
                         std::int64_t now_us) {
  if (const auto given_up = preempted_.find(freed.sequence()); given_up != preempted_.end()) {
    Request& request = *given_up->second.first;
    if (--given_up->second.second == 0) preempted_.erase(given_up);
    --request.frees_pending;
    end_if_complete(request, now_us);
    return;
  }
  const auto found = sequences_.find(freed.sequence());
  if (found == sequences_.end()) return;
  Request& request = *found->second.first;
  engine::StageKvUse& use = request.summary.kv[stage];
  use.full_bytes += freed.full_bytes();
  use.kept_bytes += freed.kept_bytes();
  const auto n_layers = static_cast<std::size_t>(freed.layer_kept_bytes_size());
  if (use.layers.size() < n_layers) use.layers.resize(n_layers);
  for (std::size_t layer = 0; layer < n_layers; ++layer) {
    engine::LayerKvUse& out = use.layers[layer];
    out.layer = static_cast<std::int32_t>(first_layer(stage)) + static_cast<std::int32_t>(layer);
    out.full_bytes += freed.full_bytes() / n_layers;
    out.kept_bytes += freed.layer_kept_bytes(static_cast<int>(layer));
  }
  --request.frees_pending;
  end_if_complete(request, now_us);
}

}  // namespace spindle::coordinator
