#pragma once
// What a trace says of a step plan.

#include <cstdint>

#include "proto/control.pb.h"

namespace spindle::worker {

// A run of one token that is sampled counts as decoded: a prompt's last token alone in its chunk
// looks the same.
struct PlanTokens {
  std::int64_t prefill = 0;
  std::int64_t decode = 0;
};
inline PlanTokens count_tokens(const control::StepPlan& plan) {
  PlanTokens tokens;
  for (const control::Run& run : plan.runs()) {
    const bool decodes = run.sample() && run.tokens_size() == 1;
    (decodes ? tokens.decode : tokens.prefill) += run.tokens_size();
  }
  return tokens;
}

// Sequences that come, go or get more room in it.
inline std::int64_t count_sequences(const control::StepPlan& plan) {
  return std::int64_t{plan.fork_size()} + plan.free_size() + plan.open_size() + plan.grow_size();
}

}  // namespace spindle::worker
