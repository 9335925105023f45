#pragma once
// The scheduler's records of requests and choices; private to scheduler*.cc.

#include <cstdint>
#include <unordered_set>
#include <vector>

#include "cluster/coordinator/scheduler.h"

namespace spindle::coordinator {

// One output of a request. A choice runs when it has a token whose K and V are not cached yet.
struct Scheduler::Choice {
  enum class State : std::uint8_t {
    kPrompt,    // its first token is not sampled yet
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
};

struct Scheduler::Request {
  engine::RequestHandle handle = 0;
  engine::EngineRequest request;
  std::unordered_set<std::int32_t>
      stop_ids;  // end-of-sequence ids, unless ignored, and the request's
  std::vector<Choice> choices;
  bool admitted = false;
  std::int64_t n_prefilled = 0;    // prompt tokens sent to the stages
  std::int32_t max_generated = 0;  // max_tokens, or what the context leaves
  int choices_left = 0;
  std::int64_t frees_pending = 0;  // (sequence, stage) pairs whose bytes are still to be reported
  Status status;                   // what on_end will say
  std::int64_t submitted_us = 0;
  std::int64_t started_us = 0;
  std::int64_t first_token_us = 0;
  engine::RequestSummary summary;

  std::int64_t n_prompt() const { return static_cast<std::int64_t>(request.prompt_ids.size()); }
  // Tokens a choice's cache will hold at most: the last generated token is never run.
  KvDemand demand() const {
    return {n_prompt(), n_prompt() + max_generated - 1, request.sampling.n_choices};
  }
};

}  // namespace spindle::coordinator
