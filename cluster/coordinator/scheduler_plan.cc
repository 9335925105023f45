// How the scheduler composes a step; the rest of the class is in scheduler.cc.

#include <algorithm>
#include <cmath>
#include <span>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"

namespace spindle::coordinator {
namespace {

// Of a step what the prompts have at least, and of their cost what a chunk has: tiny ones read the
// weights for nothing.
constexpr double kSmallestPart = 0.125;

}  // namespace

std::optional<control::StepPlan> Scheduler::next_step(std::int64_t now_us) {
  expire_requests(now_us);
  if (in_flight() >= config_.max_in_flight) return std::nullopt;
  control::StepPlan plan;
  plan.set_step(next_step_);
  StepBudget budget{config_.max_num_batched_tokens,
                    static_cast<double>(config_.max_num_batched_tokens)};
  expire_sessions(now_us);
  plan_budget(plan);
  plan_boundaries(plan);
  plan_forks(plan);
  const bool has_decode = plan_decode(plan, budget, now_us);
  admit(plan, budget, now_us);
  const double prefill_cost = plan_prefill(plan, budget);
  // Last, since admission may give up sessions and preempt.
  plan.mutable_free()->Add(to_free_.begin(), to_free_.end());
  to_free_.clear();
  unsent_pages_.clear();
  if (plan.runs().empty() && plan.fork().empty() && plan.free().empty() && plan.open().empty() &&
      plan.compress().empty()) {
    return std::nullopt;
  }
  ++next_step_;
  if (plan.report_budget()) report_outstanding_ = true;
  Step& step = in_flight_[plan.step()];
  step.sent_us = now_us;
  step.prefill_cost = prefill_cost;
  step.has_decode = has_decode;
  step.has_growth = plan.grow_size() > 0;
  step.reported.assign(ledger_.stages().size(), false);
  for (std::size_t s = 0; s < ledger_.stages().size(); ++s) {
    step.committed.push_back(ledger_.committed_pages(s));
  }
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

bool Scheduler::plan_decode(control::StepPlan& plan, StepBudget& budget, std::int64_t now_us) {
  // One micro-batch for each stage, all of the same size, so that no stage waits while another is
  // crowded; more of them would only read the weights more often.
  const int n_stages = static_cast<int>(ledger_.stages().size());
  const auto n_decode_steps =
      std::count_if(in_flight_.begin(), in_flight_.end(),
                    [](const auto& entry) { return entry.second.has_decode; });
  if (n_decode_steps >= n_stages) return false;
  const int share = (decoding_sequences_ + n_stages - 1) / n_stages;
  int n_planned = 0;
  std::vector<std::uint64_t> later;
  while (n_planned < share && budget.tokens > 0 && !ready_.empty()) {
    const std::uint64_t sequence = ready_.front();
    ready_.pop_front();
    const auto found = sequences_.find(sequence);
    if (found == sequences_.end()) continue;
    Request& request = *found->second.first;
    Choice& choice = request.choices[found->second.second];
    if (choice.state != Choice::State::kReady) continue;
    const std::int64_t n_cached = request.n_prompt() + choice.n_generated - 1;
    const Room room = find_grant(request, plan, n_cached + 1, now_us);
    if (room == Room::kNone) later.push_back(sequence);
    if (room != Room::kFound) continue;
    control::Run& run = *plan.add_runs();
    run.set_sequence(sequence);
    run.set_first_position(static_cast<std::int32_t>(n_cached));
    if (request.is_generated_boundary(n_cached) && choice.compressed_at != n_cached) {
      add_compress(plan, request, choice, n_cached);
    }
    run.add_tokens(choice.next_token);
    run.set_sample(true);
    if (compresses_after(request, choice, n_cached + 1) &&
        grow_after_run(request, plan, n_cached + 2)) {
      add_compress(plan, request, choice, n_cached + 1);
      plan.mutable_compress(plan.compress_size() - 1)->set_after_runs(true);
      choice.compressed_at = n_cached + 1;
    }
    choice.state = Choice::State::kInFlight;
    free_after_last_run(plan, request, choice);
    request.last_step = plan.step();
    waiting_.served(request.request.owner, 1);
    ++n_planned;
    --budget.tokens;
    --budget.cost;
  }
  ready_.insert(ready_.begin(), later.begin(), later.end());
  return n_planned > 0;
}

// When the token that the choice's run samples is its last for sure, the stages free the sequence
// with the same step, and the request ends a whole step earlier than by an order of its own.
void Scheduler::free_after_last_run(control::StepPlan& plan, Request& request, Choice& choice) {
  if (choice.n_generated + 1 < request.max_generated || request.choices.size() > 1 ||
      request.request.keep_session || request.at_boundary) {
    return;
  }
  plan.add_free_after_runs(choice.sequence);
  choice.freed_by_run = true;
  request.frees_pending += static_cast<std::int64_t>(ledger_.stages().size());
  set_preemptible(request, false);
}

// Whether the run that brings the cache to n_cached tokens is at a boundary that is sure to come: a
// session may end there, and is then kept as it is.
bool Scheduler::compresses_after(const Request& request, const Choice& choice,
                                 std::int64_t n_cached) {
  return request.is_generated_boundary(n_cached) && !request.request.keep_session &&
         choice.n_generated + 1 < request.max_generated;
}

// Shortest first, but for the one that was admitted first.
std::vector<engine::RequestHandle> Scheduler::prefill_order() const {
  std::vector<engine::RequestHandle> order(prefilling_.begin(), prefilling_.end());
  if (order.empty()) return order;
  std::stable_sort(order.begin() + 1, order.end(), [this](auto a, auto b) {
    return left_to_prefill(*requests_.at(a)) < left_to_prefill(*requests_.at(b));
  });
  return order;
}

// What a step may take of the prompts: with several stages an equal part of all that is not done
// for each step in flight and the next, so that no stage waits while another has all of it. At
// least a token, or the last ones of a prompt would never come.
double Scheduler::prefill_share() const {
  const auto most = static_cast<double>(config_.max_num_batched_tokens);
  if (ledger_.stages().size() == 1 || config_.max_in_flight == 1) return most;
  double left = 0;
  for (const auto& [number, step] : in_flight_) left += step.prefill_cost;
  for (const engine::RequestHandle handle : prefilling_) {
    const Request& request = *requests_.at(handle);
    left += chunk_cost(request.n_prefilled, left_to_prefill(request));
  }
  return std::clamp(left / (config_.max_in_flight + 1), std::max(kSmallestPart * most, 1.0), most);
}

// The oldest has at least half of all steps, so that shorter ones cannot hold it up. They have the
// rest, as a credit that they may spend at once, so that it does not hold up them: a few short
// prompts go through as if they were alone. Returns the chunks' cost.
double Scheduler::plan_prefill(control::StepPlan& plan, StepBudget& budget) {
  constexpr double kMostCreditSteps = 8;
  const std::vector<engine::RequestHandle> order = prefill_order();
  if (order.empty()) return 0;
  budget.cost = std::min(budget.cost, prefill_share());
  const double share = budget.cost;
  lane_credit_ = std::min(lane_credit_ + budget.cost / 2,
                          kMostCreditSteps * static_cast<double>(config_.max_num_batched_tokens));
  Request& oldest = *requests_.at(order.front());
  double others = 0;
  for (const engine::RequestHandle handle : std::span(order).subspan(1)) {
    const Request& request = *requests_.at(handle);
    if (left_to_prefill(request) >= left_to_prefill(oldest)) break;  // they are not held up by it
    others += chunk_cost(request.n_prefilled, left_to_prefill(request));
  }
  const double lane = std::min({others, budget.cost, lane_credit_});
  if (budget.cost - lane >= 1) plan_chunk(plan, oldest, budget.cost - lane, budget);
  const double before = budget.cost;
  for (const engine::RequestHandle handle : std::span(order).subspan(1)) {
    plan_chunk(plan, *requests_.at(handle), budget.cost, budget);
  }
  // What the oldest left of its own share is not charged.
  lane_credit_ = std::max(lane_credit_ - std::min(before - budget.cost, lane), 0.0);
  std::erase_if(prefilling_, [this](engine::RequestHandle handle) {
    const Request& request = *requests_.at(handle);
    return request.at_boundary || request.n_prefilled == request.n_prompt();
  });
  return share - budget.cost;
}

// Of a chunk of n_tokens after n_before others; attention costs a token of the middle of the chunk
// its context.
double Scheduler::chunk_cost(std::int64_t n_before, std::int64_t n_tokens) const {
  const auto n = static_cast<double>(n_tokens);
  if (config_.attention_parity_tokens <= 0) return n;
  const double context = static_cast<double>(n_before) + n / 2;
  return n * (1.0 + context / static_cast<double>(config_.attention_parity_tokens));
}

// Tokens whose cost is at most `cost`, but never less than a part of it.
std::int64_t Scheduler::chunk_tokens(std::int64_t n_before, double cost) const {
  if (config_.attention_parity_tokens <= 0) return static_cast<std::int64_t>(cost);
  // n (1 + (b + n / 2) / p) = cost, for n.
  const auto parity = static_cast<double>(config_.attention_parity_tokens);
  const double linear = parity + static_cast<double>(n_before);
  const double n = std::sqrt(linear * linear + 2 * parity * cost) - linear;
  return static_cast<std::int64_t>(std::max(n, std::floor(kSmallestPart * cost)));
}

void Scheduler::plan_chunk(control::StepPlan& plan, Request& request, double share,
                           StepBudget& budget) {
  const std::int64_t most =
      std::min(budget.tokens, std::max<std::int64_t>(chunk_tokens(request.n_prefilled, share), 1));
  if (budget.cost < 1 || most <= 0) return;
  const bool has_boundary = request.next_boundary < request.boundaries.size();
  std::int64_t end = has_boundary ? request.boundaries[request.next_boundary] : request.n_prompt();
  if (!has_boundary) {
    // Output that is computed anew leaves the tail where it did the first time, also when its first
    // tokens come in one chunk with the end of the prompt.
    if (request.is_generated_boundary(request.n_prefilled)) {
      add_compress(plan, request, request.choices.front(), request.n_prefilled);
    }
    end = std::min(end, request.next_boundary_after(request.n_prefilled));
  }
  const auto n_tokens = static_cast<int>(std::min<std::int64_t>(most, end - request.n_prefilled));
  control::Run& run = *plan.add_runs();
  run.set_sequence(request.choices.front().sequence);
  run.set_first_position(static_cast<std::int32_t>(request.n_prefilled));
  const auto begin = request.request.prompt_ids.begin() + request.n_prefilled;
  run.mutable_tokens()->Add(begin, begin + n_tokens);
  add_prompt_scores(request, n_tokens, run);
  budget.tokens -= n_tokens;
  budget.cost -= chunk_cost(request.n_prefilled, n_tokens);
  request.n_prefilled += n_tokens;
  if (has_boundary && request.n_prefilled == end) {
    request.at_boundary = true;
    Boundary boundary;
    boundary.n_tokens = static_cast<std::int32_t>(end);
    boundary.reports_left = static_cast<int>(ledger_.stages().size());
    request.reported.push_back(std::move(boundary));
  }
  counters_.prompt_tokens += static_cast<std::uint64_t>(n_tokens);
  waiting_.served(request.request.owner, n_tokens);
  if (request.n_prefilled == request.n_prompt()) {
    run.set_sample(true);
    for (std::size_t i = 1; i < request.choices.size(); ++i) {
      if (request.choices[i].state == Choice::State::kEnded) continue;
      *run.add_also_sample() = open_message(request, request.choices[i]);
    }
    free_after_last_run(plan, request, request.choices.front());
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
  open.set_max_tokens(static_cast<std::int32_t>(request.most_tokens()));
  open.set_prompt_tokens(static_cast<std::int32_t>(request.n_before_output()));
  const KvDemand demand = request.first_demand();
  if (request.grows()) open.set_granted_tokens(static_cast<std::int32_t>(demand.max_tokens));
  for (std::size_t stage = 0; stage < ledger_.stages().size(); ++stage) {
    open.add_reserve_pages(ledger_.reserve_pages(demand, stage, choice.index > 0));
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
