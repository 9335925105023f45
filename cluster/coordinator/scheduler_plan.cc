// How the scheduler composes a step; the rest of the class is in scheduler.cc.

#include <algorithm>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"
#include "kernels/core/check.h"

namespace spindle::coordinator {

std::optional<control::StepPlan> Scheduler::next_step(std::int64_t now_us) {
  if (in_flight() >= config_.max_in_flight) return std::nullopt;
  control::StepPlan plan;
  int budget = config_.max_num_batched_tokens;
  expire_sessions(now_us);
  plan_boundaries(plan);
  plan_forks(plan);
  const bool has_decode = plan_decode(plan, budget);
  plan_prefill(plan, budget, now_us);
  // Last, since admission may give up sessions.
  plan.mutable_free()->Add(to_free_.begin(), to_free_.end());
  to_free_.clear();
  unsent_pages_.clear();
  if (plan.runs().empty() && plan.fork().empty() && plan.free().empty() &&
      plan.compress().empty()) {
    return std::nullopt;
  }
  plan.set_step(next_step_++);
  Step& step = in_flight_[plan.step()];
  step.sent_us = now_us;
  step.has_decode = has_decode;
  step.reported.assign(ledger_.stages().size(), false);
  return plan;
}

void Scheduler::plan_forks(control::StepPlan& plan) {
  std::vector<std::uint64_t> later;
  for (const std::uint64_t sequence : to_fork_) {
    const auto found = sequences_.find(sequence);
    if (found == sequences_.end()) continue;
    Request& request = *found->second.first;
    Choice& choice = request.choices[found->second.second];
    if (choice.state == Choice::State::kEnded) continue;
    if (request.at_boundary) {  // choices share what the boundary leaves
      later.push_back(sequence);
      continue;
    }
    control::ForkSequence& fork = *plan.add_fork();
    fork.set_parent(request.choices.front().sequence);
    fork.set_n_tokens(static_cast<std::int32_t>(request.n_prompt()));
    *fork.mutable_child() = open_message(request, choice);
    choice.on_stages = true;
  }
  to_fork_ = std::move(later);
}

bool Scheduler::plan_decode(control::StepPlan& plan, int& budget) {
  // One micro-batch for each stage, all of the same size, so that no stage waits while another is
  // crowded; more of them would only read the weights more often.
  const int n_stages = static_cast<int>(ledger_.stages().size());
  const auto n_decode_steps =
      std::count_if(in_flight_.begin(), in_flight_.end(),
                    [](const auto& entry) { return entry.second.has_decode; });
  if (n_decode_steps >= n_stages) return false;
  const int share = (decoding_sequences_ + n_stages - 1) / n_stages;
  int n_planned = 0;
  while (n_planned < share && budget > 0 && !ready_.empty()) {
    const std::uint64_t sequence = ready_.front();
    ready_.pop_front();
    const auto found = sequences_.find(sequence);
    if (found == sequences_.end()) continue;
    const Request& request = *found->second.first;
    Choice& choice = found->second.first->choices[found->second.second];
    if (choice.state != Choice::State::kReady) continue;
    control::Run& run = *plan.add_runs();
    run.set_sequence(sequence);
    const std::int64_t n_cached = request.n_prompt() + choice.n_generated - 1;
    run.set_first_position(static_cast<std::int32_t>(n_cached));
    if (request.is_generated_boundary(n_cached)) add_compress(plan, request, choice, n_cached);
    run.add_tokens(choice.next_token);
    run.set_sample(true);
    choice.state = Choice::State::kInFlight;
    ++n_planned;
    --budget;
  }
  return n_planned > 0;
}

void Scheduler::plan_prefill(control::StepPlan& plan, int& budget, std::int64_t now_us) {
  std::size_t next = 0;
  while (budget > 0) {
    if (next == prefilling_.size() && !admit_next(plan, now_us)) return;
    Request& request = *requests_.at(prefilling_[next]);
    plan_chunk(plan, request, budget);
    if (request.n_prefilled == request.n_prompt() || request.at_boundary) {
      prefilling_.erase(prefilling_.begin() + static_cast<std::ptrdiff_t>(next));
    } else {
      ++next;  // one chunk per request and step
    }
  }
}

bool Scheduler::admit_next(control::StepPlan& plan, std::int64_t now_us) {
  if (waiting_.empty()) return false;
  Request& request = *requests_.at(waiting_.front());
  if (running_sequences_ + request.request.sampling.n_choices > config_.max_num_seqs) return false;
  if (Status status = continue_session(request); !status.ok()) {
    stop_request(request, status, now_us);
    return admit_next(plan, now_us);
  }
  const engine::RequestHandle handle = request.handle;
  if (!commit_next(request, now_us)) {
    const bool ended = !requests_.contains(handle);
    return ended && admit_next(plan, now_us);
  }
  waiting_.pop_front();
  prefilling_.push_back(request.handle);
  request.admitted = true;
  request.started_us = now_us;
  running_sequences_ += request.request.sampling.n_choices;
  --counters_.waiting;
  counters_.waiting_prompt_tokens -= request.n_prompt();
  ++counters_.running;
  request.choices.front().on_stages = true;
  if (request.session_sequence == 0) {
    *plan.add_open() = open_message(request, request.choices.front());
    return true;
  }
  sessions_.at(request.request.session_id).used_us = now_us;
  control::ForkSequence& fork = *plan.add_fork();
  fork.set_parent(request.session_sequence);
  fork.set_n_tokens(static_cast<std::int32_t>(request.n_cached));
  const auto begin = request.request.prompt_ids.begin();
  fork.mutable_tokens()->Add(begin, begin + request.n_cached);
  *fork.mutable_child() = open_message(request, request.choices.front());
  request.n_prefilled = request.n_cached;
  return true;
}

// Finds room for the request, at the cost of sessions if need be. Ends it when it can have none.
bool Scheduler::commit_next(Request& request, std::int64_t now_us) {
  if (make_room(request)) {
    CHECK(ledger_.try_commit(request.handle, request.demand(), request.session_sequence),
          "there is room for the request");
    return true;
  }
  // With nothing else running only the session that it continues is in the way.
  if (counters_.running > 0 || !to_free_.empty() || request.session_sequence == 0) return false;
  if (request.continues_compressed) {
    stop_request(request,
                 resource_exhausted("session_id: the session and what this request may add need "
                                    "more KV memory than the cluster has"),
                 now_us);
    return false;
  }
  // Full precision is the same when it is computed again.
  drop_session(request.request.session_id);
  begin_anew(request);
  return commit_next(request, now_us);
}

void Scheduler::plan_chunk(control::StepPlan& plan, Request& request, int& budget) {
  const bool has_boundary = request.next_boundary < request.boundaries.size();
  std::int64_t end = has_boundary ? request.boundaries[request.next_boundary] : request.n_prompt();
  if (!has_boundary) {
    // Output that is computed anew leaves the tail where it did the first time, also when its first
    // tokens come in one chunk with the end of the prompt.
    if (request.is_generated_boundary(request.n_prefilled)) {
      add_compress(plan, request, request.choices.front(), request.n_prefilled);
    }
    const std::int64_t done =
        std::max<std::int64_t>(request.n_prefilled - request.n_before_output(), 0);
    const std::int64_t next =
        (done / kvstore::kGeneratedBoundary + 1) * kvstore::kGeneratedBoundary;
    end = std::min(end, request.n_before_output() + next);
  }
  const auto n_tokens = static_cast<int>(std::min<std::int64_t>(budget, end - request.n_prefilled));
  control::Run& run = *plan.add_runs();
  run.set_sequence(request.choices.front().sequence);
  run.set_first_position(static_cast<std::int32_t>(request.n_prefilled));
  const auto begin = request.request.prompt_ids.begin() + request.n_prefilled;
  run.mutable_tokens()->Add(begin, begin + n_tokens);
  add_prompt_scores(request, n_tokens, run);
  request.n_prefilled += n_tokens;
  if (has_boundary && request.n_prefilled == end) {
    request.at_boundary = true;
    Boundary boundary;
    boundary.n_tokens = static_cast<std::int32_t>(end);
    boundary.reports_left = static_cast<int>(ledger_.stages().size());
    request.reported.push_back(std::move(boundary));
  }
  counters_.prompt_tokens += static_cast<std::uint64_t>(n_tokens);
  budget -= n_tokens;
  if (request.n_prefilled == request.n_prompt()) {
    run.set_sample(true);
    for (std::size_t i = 1; i < request.choices.size(); ++i) {
      if (request.choices[i].state == Choice::State::kEnded) continue;
      *run.add_also_sample() = open_message(request, request.choices[i]);
    }
  }
}

void Scheduler::add_prompt_scores(const Request& request, int n_tokens, control::Run& run) const {
  const engine::PromptScores& wanted = request.request.prompt_scores;
  const std::int64_t begin = request.n_prefilled;
  // The row at position p scores the token at p + 1.
  const std::int64_t first = std::max<std::int64_t>(wanted.first - 1, begin);
  const std::int64_t end = std::min<std::int64_t>(wanted.end - 1, begin + n_tokens);
  if (first >= end) return;
  run.set_score_first(static_cast<std::int32_t>(first - begin));
  run.set_score_end(static_cast<std::int32_t>(end - begin));
  run.set_score_dense(wanted.dense);
  const std::int64_t next = begin + n_tokens;
  run.set_score_next(
      next < request.n_prompt() ? request.request.prompt_ids[static_cast<std::size_t>(next)] : -1);
}

control::OpenSequence Scheduler::open_message(const Request& request, const Choice& choice) const {
  const engine::SamplingParams& params = request.request.sampling;
  control::OpenSequence open;
  open.set_sequence(choice.sequence);
  open.set_max_tokens(static_cast<std::int32_t>(request.demand().max_tokens));
  open.set_prompt_tokens(static_cast<std::int32_t>(request.n_before_output()));
  for (std::size_t stage = 0; stage < ledger_.stages().size(); ++stage) {
    open.add_reserve_pages(ledger_.reserve_pages(request.demand(), stage, choice.index > 0));
  }
  if (choice.index == 0) add_boundaries(request, open);
  control::Sampling& sampling = *open.mutable_sampling();
  sampling.set_temperature(params.temperature);
  sampling.set_top_k(params.top_k);
  sampling.set_top_p(params.top_p);
  sampling.set_min_p(params.min_p);
  sampling.set_repetition_penalty(params.repetition_penalty);
  sampling.set_presence_penalty(params.presence_penalty);
  sampling.set_frequency_penalty(params.frequency_penalty);
  for (const auto& [id, bias] : params.logit_bias) {
    sampling.add_bias_ids(id);
    sampling.add_bias_values(bias);
  }
  // With the client's seed the same request gives the same output whenever it comes.
  sampling.set_seed(params.has_seed ? params.seed : config_.seed);
  sampling.set_request(params.has_seed ? 0 : request.handle);
  sampling.set_choice(choice.index);
  sampling.set_n_logprobs(params.n_logprobs);
  sampling.set_min_tokens(params.min_tokens);
  if (params.min_tokens > 0) {
    std::vector<std::int32_t> banned(request.stop_ids.begin(), request.stop_ids.end());
    std::sort(banned.begin(), banned.end());
    sampling.mutable_banned_before_min()->Add(banned.begin(), banned.end());
  }
  return open;
}

}  // namespace spindle::coordinator
