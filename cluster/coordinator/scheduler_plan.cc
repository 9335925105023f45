// How the scheduler composes a step; the rest of the class is in scheduler.cc.

#include <algorithm>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"

namespace spindle::coordinator {

std::optional<control::StepPlan> Scheduler::next_step(std::int64_t now_us) {
  if (in_flight() >= config_.max_in_flight) return std::nullopt;
  control::StepPlan plan;
  int budget = config_.max_num_batched_tokens;
  plan_forks_and_frees(plan);
  const bool has_decode = plan_decode(plan, budget);
  plan_prefill(plan, budget, now_us);
  if (plan.runs().empty() && plan.fork().empty() && plan.free().empty()) return std::nullopt;
  plan.set_step(next_step_++);
  Step& step = in_flight_[plan.step()];
  step.sent_us = now_us;
  step.has_decode = has_decode;
  step.reported.assign(ledger_.stages().size(), false);
  return plan;
}

void Scheduler::plan_forks_and_frees(control::StepPlan& plan) {
  for (const std::uint64_t sequence : to_fork_) {
    const auto found = sequences_.find(sequence);
    if (found == sequences_.end()) continue;
    Request& request = *found->second.first;
    Choice& choice = request.choices[found->second.second];
    if (choice.state == Choice::State::kEnded) continue;
    control::ForkSequence& fork = *plan.add_fork();
    fork.set_parent(request.choices.front().sequence);
    *fork.mutable_child() = open_message(request, choice);
    choice.on_stages = true;
  }
  to_fork_.clear();
  plan.mutable_free()->Add(to_free_.begin(), to_free_.end());
  to_free_.clear();
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
    run.set_first_position(static_cast<std::int32_t>(request.n_prompt()) + choice.n_generated - 1);
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
    if (request.n_prefilled == request.n_prompt()) {
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
  if (!ledger_.try_commit(request.handle, request.demand())) return false;
  waiting_.pop_front();
  prefilling_.push_back(request.handle);
  request.admitted = true;
  request.started_us = now_us;
  running_sequences_ += request.request.sampling.n_choices;
  --counters_.waiting;
  counters_.waiting_prompt_tokens -= request.n_prompt();
  ++counters_.running;
  *plan.add_open() = open_message(request, request.choices.front());
  request.choices.front().on_stages = true;
  return true;
}

void Scheduler::plan_chunk(control::StepPlan& plan, Request& request, int& budget) {
  const auto n_tokens =
      static_cast<int>(std::min<std::int64_t>(budget, request.n_prompt() - request.n_prefilled));
  control::Run& run = *plan.add_runs();
  run.set_sequence(request.choices.front().sequence);
  run.set_first_position(static_cast<std::int32_t>(request.n_prefilled));
  const auto begin = request.request.prompt_ids.begin() + request.n_prefilled;
  run.mutable_tokens()->Add(begin, begin + n_tokens);
  request.n_prefilled += n_tokens;
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

control::OpenSequence Scheduler::open_message(const Request& request, const Choice& choice) const {
  const engine::SamplingParams& params = request.request.sampling;
  control::OpenSequence open;
  open.set_sequence(choice.sequence);
  open.set_max_tokens(static_cast<std::int32_t>(request.demand().max_tokens));
  open.set_prompt_tokens(static_cast<std::int32_t>(request.n_prompt()));
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
