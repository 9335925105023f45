#pragma once
// What a request takes of the KV ledger: how far it is granted tokens, and what rank 0 commits for
// them. The scheduler's arithmetic, shared with the sizing of a cluster (sizing.h).
//
// Thread-safety: pure functions.

#include <algorithm>
#include <cstdint>

#include "cluster/coordinator/kv_ledger.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::coordinator {

// Tokens of the cache when the output is complete: the last generated token is never run, so it is
// in no cache.
constexpr std::int64_t most_cached_tokens(std::int64_t n_prompt, std::int64_t max_generated) {
  return n_prompt + max_generated - 1;
}

// The next boundary of generated tokens, which are kGeneratedBoundary apart from where output
// begins.
constexpr std::int64_t next_boundary_after(std::int64_t n_before_output, std::int64_t n_in_cache) {
  const std::int64_t done = std::max<std::int64_t>(n_in_cache - n_before_output, 0);
  return n_before_output + (done / kvstore::kGeneratedBoundary + 1) * kvstore::kGeneratedBoundary;
}

struct RequestTokens {
  std::int64_t n_before_output = 0;
  std::int64_t granted = 0;  // room that is asked for, in tokens of the cache
  int n_choices = 1;
  // Of the prompt's boundaries; 0 of none: nothing of it is compressed.
  int n_boundaries = 0;
  std::int64_t last_boundary = 0;
  int sinks = 0;
  int recent = 0;
  // What comes from a kept sequence.
  bool continues_compressed = false;
  std::int64_t n_cached = 0;
  std::int64_t inherited_tail_begin = 0;
  int inherited_recent = 0;
};
KvDemand request_demand(const RequestTokens& request);

// What a request that grows will take at its next boundary, beyond the max_tokens of its demand, in
// uncompressed tokens. Where tokens leave the tail they are packed in 4 bits or fewer; their
// scales, a last block partly filled and a tail that begins anywhere in a page make it half of what
// they took.
constexpr std::int64_t tokens_ahead_of(const KvDemand& demand, std::int64_t most_tokens) {
  const std::int64_t n_tokens =
      std::min<std::int64_t>(most_tokens - demand.max_tokens, kvstore::kGeneratedBoundary);
  return demand.compresses ? (n_tokens + 1) / 2 : n_tokens;
}

// Pages of a stage that are left to those who run when another is admitted: for tokens_ahead of all
// of them together, and at least for what one is granted until the stage has said what it needs;
// but a part of the stage at most.
std::int64_t headroom_pages(const kvstore::KvShape& shape, const StageCapacity& stage,
                            std::int64_t tokens_ahead);

}  // namespace spindle::coordinator
