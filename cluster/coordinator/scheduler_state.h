#pragma once
// The scheduler's records of requests and choices; private to scheduler*.cc.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <unordered_set>
#include <vector>

#include "cluster/coordinator/request_demand.h"
#include "cluster/coordinator/scheduler.h"

namespace spindle::coordinator {

// One output of a request. A choice runs when it has a token whose K and V are not cached yet.
struct Scheduler::Choice {
  enum class State : std::uint8_t {
    kPrompt,    // its first token is not sampled yet
    kHeld,      // sampled, but its prompt's boundary is not planned yet
    kReady,     // next_token waits to be run
    kInFlight,  // next_token is on its way through the stages
    kEnded,
  };

  std::uint64_t sequence = 0;
  std::int32_t index = 0;
  State state = State::kPrompt;
  bool on_stages = false;  // opened or forked in a plan that was sent
  std::int32_t n_generated = 0;
  std::int32_t next_token = 0;
  std::vector<std::int32_t> generated;
  std::int64_t compressed_at = 0;  // the last boundary that was ordered after a run
  bool freed_by_run = false;       // with its last run, which is sent
  // Ended, its sequence stays on the stages as a session; with how many tokens in the cache.
  bool kept = false;
  std::int64_t n_cached = 0;
  // Ended at once, but the others fork from it after the boundary.
  bool waits_for_forks = false;
};

// A boundary of a prompt that the stages have run up to and are reporting on.
struct Scheduler::Boundary {
  std::int32_t n_tokens = 0;
  int reports_left = 0;  // of scores
  bool planned = false;
  kvstore::BoundaryReport report;
  kvstore::SequencePlan plan;
  engine::BoundaryUse use;
  std::vector<std::uint64_t> stage_us;  // scoring and compressing
};

// More room that a request was given in a step.
struct Growth {
  std::uint64_t step = 0;
  std::vector<std::int64_t> pages;  // [n_stages]
};

struct Scheduler::Request {
  engine::RequestHandle handle = 0;
  engine::EngineRequest request;
  std::unordered_set<std::int32_t>
      stop_ids;  // end-of-sequence ids, unless ignored, and the request's
  std::vector<Choice> choices;
  bool admitted = false;
  std::uint64_t last_step = 0;     // whose plan opens it or runs a decode token of it
  std::uint64_t admission = 0;     // counts up, the youngest has the highest
  WaitingTicket ticket;            // while it runs: to wait again where it was
  std::uint64_t queued_bytes = 0;  // of KV, while it waits
  std::int64_t deadline_us = 0;    // 0: none
  // Of requests that grow: tokens that the ledger has room for, what was added since the oldest
  // step in flight, and how many reports of the stages will say what they really need.
  std::int64_t granted_tokens = 0;
  std::int64_t tokens_ahead = 0;  // its part of Scheduler::tokens_ahead_
  std::vector<Growth> growths;
  int page_reports_pending = 0;
  std::int64_t n_prefilled = 0;  // prompt tokens sent to the stages
  // Prompt lengths where the KV is compressed, ascending, and the next of them.
  std::vector<std::int32_t> boundaries;
  std::size_t next_boundary = 0;
  // The stages were sent up to boundaries[next_boundary], whose plan is not made yet: nothing of
  // the request may run.
  bool at_boundary = false;
  std::vector<Boundary> reported;  // one for each boundary reached
  // Levels by stage of each boundary that was planned: the same ones when it is computed anew.
  std::vector<std::vector<std::size_t>> boundary_levels;
  int compressions_pending = 0;               // stages' reports of boundaries that are planned
  std::optional<kvstore::SequencePlan> plan;  // of the last boundary
  std::int64_t n_compressed = 0;              // tokens at that boundary
  std::int64_t tail_begin = 0;                // where the tail began after it
  std::int64_t oldest_tail_begin = 0;         // of its heads, see Session
  // What it takes over from a kept sequence: where the oldest tail of its heads begins, and how
  // long tails are there.
  bool continues_compressed = false;
  std::int64_t inherited_tail_begin = 0;
  int inherited_recent = 0;
  std::vector<std::int64_t> used_pages;    // of the first choice at its last boundary, by stage
  std::vector<std::int64_t> prompt_pages;  // of those, at the prompt's last boundary
  std::uint64_t session_sequence = 0;      // the kept sequence it began from, or 0
  std::int64_t n_cached = 0;
  std::int32_t max_generated = 0;  // max_tokens, or what the context leaves
  int choices_left = 0;
  std::int64_t frees_pending = 0;  // (sequence, stage) pairs whose bytes are still to be reported
  Status status;                   // what on_end will say
  std::int64_t submitted_us = 0;
  std::int64_t started_us = 0;
  std::int64_t first_token_us = 0;
  engine::RequestSummary summary;

  std::int64_t n_prompt() const { return static_cast<std::int64_t>(request.prompt_ids.size()); }
  // Where output begins, which decides the boundaries of generated tokens.
  std::int64_t n_before_output() const { return n_prompt() - request.resumed_tokens; }
  bool is_generated_boundary(std::int64_t n_in_cache) const {
    return n_in_cache > n_before_output() &&
           (n_in_cache - n_before_output()) % kvstore::kGeneratedBoundary == 0 && plan &&
           !kvstore::is_uncompressed(*plan);
  }
  bool has_policy() const {
    return request.kv_policy.profile != kvstore::KvProfile::kFull ||
           !request.kv_policy.overrides.empty();
  }
  // Whether it begins with less than all it may take.
  bool grows() const {
    return request.sampling.n_choices == 1 && request.session_id.empty() &&
           request.prompt_scores.end == 0;
  }
  // Tokens of the longest form, and those up to the boundary after the prompt.
  std::int64_t most_tokens() const { return most_cached_tokens(n_prompt(), max_generated); }
  std::int64_t first_grant() const {
    return std::min(most_tokens(), next_boundary_after(n_prompt()));
  }
  std::int64_t next_grant() const {
    return std::min(most_tokens(), next_boundary_after(granted_tokens));
  }
  std::int64_t next_boundary_after(std::int64_t n_in_cache) const {
    return coordinator::next_boundary_after(n_before_output(), n_in_cache);
  }
  KvDemand demand() const;                             // all it may take
  KvDemand demand(std::int64_t granted_tokens) const;  // up to that many tokens
  KvDemand first_demand() const { return grows() ? demand(first_grant()) : demand(); }
};

// Runs a release in the ledger and books what it gave back.
template <typename Release>
void Scheduler::give_back(const Release& release) {
  unsent_pages_.resize(ledger_.stages().size());
  for (std::size_t s = 0; s < unsent_pages_.size(); ++s) {
    unsent_pages_[s] += ledger_.committed_pages(s);
  }
  release();
  for (std::size_t s = 0; s < unsent_pages_.size(); ++s) {
    unsent_pages_[s] -= ledger_.committed_pages(s);
  }
}

}  // namespace spindle::coordinator
