// Who runs: admission, room for those that grow, and preemption. The rest of the class is in
// scheduler.cc.

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>
#include <utility>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"
#include "kernels/core/check.h"

namespace spindle::coordinator {
namespace {

// Of those that wait, how many are tried in one step: the order is by rank, and what comes after
// many that do not fit will hardly be due.
constexpr int kTries = 16;

}  // namespace

void Scheduler::expire_requests(std::int64_t now_us) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now_us) {
    const engine::RequestHandle handle = deadlines_.begin()->second;
    deadlines_.erase(deadlines_.begin());
    Request& request = *requests_.at(handle);
    stop_request(request,
                 deadline_exceeded("the request was not done after its " +
                                   std::to_string(request.request.timeout_us / 1000) + " ms"),
                 now_us);
  }
}

std::int64_t Scheduler::left_to_prefill(const Request& request) {
  return request.n_prompt() - request.n_prefilled;
}

// While the prompts that are admitted fill the step, others would only hold KV. But there is a lane
// beside the oldest of them (plan_prefill): for prompts that are shorter than what is left of it,
// or done in half of a step, as long as those of the lane do not fill their half.
bool Scheduler::may_prefill(const Request& request, const StepBudget& budget) const {
  std::int64_t left = 0;
  for (const engine::RequestHandle handle : prefilling_) {
    left += left_to_prefill(*requests_.at(handle));
  }
  if (left < budget.tokens) return true;
  const std::int64_t oldest =
      prefilling_.empty() ? 0 : left_to_prefill(*requests_.at(prefilling_.front()));
  return budget.tokens > 0 && left - oldest < config_.max_num_batched_tokens &&
         request.n_prompt() <=
             std::max<std::int64_t>(config_.max_num_batched_tokens / 2, oldest - 1) &&
         2 * static_cast<std::int64_t>(prefilling_.size()) <= config_.max_num_seqs;
}

void Scheduler::admit(control::StepPlan& plan, const StepBudget& budget, std::int64_t now_us) {
  int n_without_room = 0;
  WaitingQueue::Walk walk(waiting_);
  while (const auto next = walk.next()) {
    const engine::RequestHandle handle = *next;
    const auto found = requests_.find(handle);
    // One that ended stays until the stages have freed what it held before it was preempted.
    if (found == requests_.end() || found->second->choices_left == 0) continue;
    Request& request = *found->second;
    if (!may_prefill(request, budget)) continue;
    if (try_admit(plan, request, now_us) != Room::kNone) continue;
    if (waiting_.is_due(handle) || ++n_without_room == kTries) return;
  }
}

Scheduler::Room Scheduler::try_admit(control::StepPlan& plan, Request& request,
                                     std::int64_t now_us) {
  const int n_choices = request.request.sampling.n_choices;
  if (running_sequences_ + n_choices > config_.max_num_seqs) return Room::kNone;
  if (Status status = continue_session(request); !status.ok()) {
    stop_request(request, status, now_us);
    return Room::kEnded;
  }
  if (const Room room = commit(request, now_us); room != Room::kFound) return room;
  count_waiting(request, -1);
  request.ticket = waiting_.take(request.handle);
  prefilling_.push_back(request.handle);
  request.admitted = true;
  request.admission = ++n_admissions_;
  request.last_step = next_step_;
  if (request.started_us == 0) request.started_us = now_us;
  running_sequences_ += n_choices;
  if (request.grows()) {
    request.granted_tokens = request.first_grant();
    set_tokens_ahead(request, tokens_ahead_of(request.first_demand(), request.most_tokens()));
    set_preemptible(request, true);
  }
  ++counters_.running;
  request.choices.front().on_stages = true;
  if (request.session_sequence == 0) {
    *plan.add_open() = open_message(request, request.choices.front());
    return Room::kFound;
  }
  sessions_.at(request.request.session_id).used_us = now_us;
  control::ForkSequence& fork = *plan.add_fork();
  fork.set_parent(request.session_sequence);
  fork.set_n_tokens(static_cast<std::int32_t>(request.n_cached));
  const auto begin = request.request.prompt_ids.begin();
  fork.mutable_tokens()->Add(begin, begin + request.n_cached);
  *fork.mutable_child() = open_message(request, request.choices.front());
  request.n_prefilled = request.n_cached;
  return Room::kFound;
}

// Finds room for the request, at the cost of sessions and of requests of a lower priority if need
// be. Ends it when it can have none.
Scheduler::Room Scheduler::commit(Request& request, std::int64_t now_us) {
  if (make_room(request) || (preempt_lower(request) && make_room(request))) {
    CHECK(ledger_.try_commit(request.handle, request.first_demand(), request.session_sequence),
          "there is room for the request");
    return Room::kFound;
  }
  // With nothing else running only the session that it continues is in the way.
  if (counters_.running > 0 || !to_free_.empty() || request.session_sequence == 0) {
    return Room::kNone;
  }
  if (request.continues_compressed) {
    stop_request(request,
                 resource_exhausted("session_id: the session and what this request may add need "
                                    "more KV memory than the cluster has"),
                 now_us);
    return Room::kEnded;
  }
  // Full precision is the same when it is computed again.
  drop_session(request.request.session_id);
  begin_anew(request);
  return commit(request, now_us);
}

// By stage, when another request is admitted.
std::vector<std::int64_t> Scheduler::headroom() const {
  std::vector<std::int64_t> pages;
  for (const StageCapacity& stage : ledger_.stages()) {
    pages.push_back(headroom_pages(ledger_.shape(), stage, tokens_ahead_));
  }
  return pages;
}

void Scheduler::set_tokens_ahead(Request& request, std::int64_t n_tokens) {
  tokens_ahead_ += n_tokens - request.tokens_ahead;
  request.tokens_ahead = n_tokens;
}

// Whether it may be preempted: it runs, and can be computed anew from what is known of it.
void Scheduler::set_preemptible(Request& request, bool can_be) {
  const std::pair key(request.request.priority, request.admission);
  if (can_be) {
    preemptible_.emplace(key, &request);
  } else {
    preemptible_.erase(key);
  }
}

// Requests of a lower priority than this one's give it their room, the youngest of the lowest
// first, if that is enough; but not those with a run in the plan that is being composed. What is in
// flight may be among them, since it is freed by a later plan.
bool Scheduler::preempt_lower(const Request& request) {
  const auto lower = preemptible_.upper_bound(
      {request.request.priority, std::numeric_limits<std::uint64_t>::max()});
  if (lower == preemptible_.end() || request.session_sequence != 0) return false;
  const std::vector<std::int64_t> pages = ledger_.total_pages(request.first_demand());
  std::vector<std::int64_t> given_back = headroom();
  for (std::int64_t& n : given_back) n = -n;
  std::vector<Request*> given_up;
  for (auto next = preemptible_.end(); next != lower;) {
    Request* victim = (--next)->second;
    if (ledger_.fits(pages, given_back)) break;
    if (victim->last_step == next_step_) continue;
    given_up.push_back(victim);
    const std::vector<std::int64_t> more = ledger_.pages_of(victim->handle);
    for (std::size_t s = 0; s < more.size(); ++s) given_back[s] += more[s];
  }
  if (!ledger_.fits(pages, given_back)) return false;
  for (Request* victim : given_up) preempt(*victim);
  return true;
}

// What more a running request may take up to granted_tokens.
std::vector<std::int64_t> Scheduler::pages_to_grow(const Request& request,
                                                   std::int64_t granted_tokens) const {
  const KvDemand demand = request.demand(granted_tokens);
  const std::vector<std::int64_t> held = ledger_.pages_of(request.handle);
  std::vector<std::int64_t> pages;
  for (std::size_t s = 0; s < held.size(); ++s) {
    const int n_layers = ledger_.stages()[s].n_layers;
    pages.push_back(kvstore::grow_pages(ledger_.shape(), n_layers, demand, request.granted_tokens,
                                        granted_tokens - request.granted_tokens));
    // Once the stages have said what it really holds, never more than it would have begun with.
    if (request.page_reports_pending == 0) {
      const std::int64_t most = ledger_.reserve_pages(demand, s, false);
      pages[s] = std::clamp<std::int64_t>(most - held[s], 0, pages[s]);
    }
  }
  return pages;
}

// Room for n_tokens of a request that is about to run. kNone: not in this plan.
Scheduler::Room Scheduler::find_grant(Request& request, control::StepPlan& plan,
                                      std::int64_t n_tokens, std::int64_t now_us) {
  if (!request.grows() || n_tokens <= request.granted_tokens) return Room::kFound;
  const std::int64_t granted = request.next_grant();
  const std::vector<std::int64_t> pages = pages_to_grow(request, granted);
  while (!ledger_.try_grow(request.handle, pages)) {
    // What others were granted is an upper bound, of which the stages will give back most.
    if (plan.grow_size() > 0 ||
        std::ranges::any_of(in_flight_, [](const auto& step) { return step.second.has_growth; })) {
      return Room::kNone;
    }
    if (drop_oldest_session()) continue;
    Request* victim = std::prev(preemptible_.end())->second;
    if (victim->last_step == next_step_) return Room::kNone;
    if (victim == &request && counters_.running == 1) {
      if (!in_flight_.empty() || !to_free_.empty()) return Room::kNone;
      stop_request(request,
                   resource_exhausted("the request needs more KV memory than the cluster has"),
                   now_us);
      return Room::kEnded;
    }
    preempt(*victim);
    if (victim == &request) return Room::kEnded;
  }
  grant(request, plan, granted, pages);
  return Room::kFound;
}

// Of a request whose run reaches a boundary and is compressed after it: the growth that follows
// goes with the same plan, so that nobody takes the room in between.
bool Scheduler::grow_after_run(Request& request, control::StepPlan& plan, std::int64_t n_tokens) {
  if (!request.grows() || n_tokens <= request.granted_tokens) return true;
  const std::int64_t granted = request.next_grant();
  const std::vector<std::int64_t> pages = pages_to_grow(request, granted);
  if (!ledger_.try_grow(request.handle, pages)) return false;
  grant(request, plan, granted, pages);
  plan.mutable_grow(plan.grow_size() - 1)->set_after_runs(true);
  return true;
}

void Scheduler::grant(Request& request, control::StepPlan& plan, std::int64_t granted,
                      const std::vector<std::int64_t>& pages) {
  std::erase_if(request.growths, [this](const Growth& growth) {
    return in_flight_.empty() || growth.step < in_flight_.begin()->first;
  });
  request.growths.push_back({plan.step(), pages});
  request.granted_tokens = granted;
  set_tokens_ahead(request, tokens_ahead_of(request.demand(granted), request.most_tokens()));
  request.page_reports_pending += static_cast<int>(pages.size());
  control::GrowSequence& grow = *plan.add_grow();
  grow.set_sequence(request.choices.front().sequence);
  grow.set_granted_tokens(static_cast<std::int32_t>(granted));
  grow.mutable_more_pages()->Add(pages.begin(), pages.end());
  grow.set_sinks(request.plan ? request.plan->sinks : 0);
  grow.set_recent(request.plan ? request.plan->recent : 0);
}

// Gives back all that the request holds; it waits again where it was, with its output so far as
// part of its prompt. What its old sequence still samples is sampled again.
void Scheduler::preempt(Request& request) {
  Choice& choice = request.choices.front();
  const std::vector<std::int32_t> generated = std::move(choice.generated);
  const auto n_generated = static_cast<std::int32_t>(generated.size());
  if (choice.state != Choice::State::kPrompt) --decoding_sequences_;
  sequences_.erase(choice.sequence);
  preempted_.emplace(choice.sequence, std::pair(&request, ledger_.stages().size()));
  free_choice(request, choice);
  std::erase(prefilling_, request.handle);
  --running_sequences_;
  set_tokens_ahead(request, 0);
  set_preemptible(request, false);
  --counters_.running;
  ++counters_.preemptions;
  ++events_of(request).preemptions;
  counters_.recomputed_tokens += static_cast<std::uint64_t>(request.n_prefilled) +
                                 static_cast<std::uint64_t>(std::max(n_generated - 1, 0));

  const std::int32_t index = std::exchange(choice, {}).index;
  choice.sequence = next_sequence_++;
  choice.index = index;
  sequences_.emplace(choice.sequence, std::pair(&request, std::size_t{0}));
  std::vector<std::int32_t>& prompt = request.request.prompt_ids;
  prompt.insert(prompt.end(), generated.begin(), generated.end());
  request.request.resumed_tokens += n_generated;
  request.max_generated -= n_generated;
  request.admitted = false;
  request.n_prefilled = 0;
  request.at_boundary = false;
  request.reported.clear();
  request.compressions_pending = 0;
  request.page_reports_pending = 0;
  request.granted_tokens = 0;
  request.growths.clear();
  request.used_pages.clear();
  request.prompt_pages.clear();
  begin_anew(request);
  count_waiting(request, 1);
  request.ticket.work = request.n_prompt();
  waiting_.push_back(request.ticket);
}

}  // namespace spindle::coordinator
