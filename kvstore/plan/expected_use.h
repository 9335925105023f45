#pragma once
// What a sequence is expected to hold, before any prompt is seen: the plan of a prompt whose heads
// all score their tokens alike, and from it the bytes and pages of a stage's layers at the end of
// the prompt and after every later boundary.
//
// What is exact and what is not: modes, codecs, windows and sizes are the plan's own, and bytes
// those of kv_bytes.cc. Which head keeps how many tokens of a budget that all share, which layers
// are lazy, what codebooks shrink to, and a few pages of gaps between packed pieces and of KIVI's
// raw remainders, depend on the prompt.
//
// Thread-safety: plain values and pure functions.

#include <cstdint>

#include "kvstore/plan/kv_plan.h"
#include "kvstore/plan/kv_shape.h"
#include "kvstore/plan/level_curves.h"

namespace spindle::kvstore {

// Every head's candidates spread alike over as many scores. Lazy masses fall in an order that every
// run of layers has its part in: the radical inverse of the layer's number.
BoundaryReport even_report(const KvPolicy& policy, const KvModel& model, std::int64_t n_tokens);

// The policy's plan for a prompt of n_tokens; uncompressed for one that is too short for any. What
// plan_boundary refuses.
Result<SequencePlan> expected_plan(const KvPolicy& policy, const KvModel& model,
                                   const ProfileTable* table, std::int64_t n_tokens);

struct ExpectedUse {
  std::uint64_t bytes = 0;          // tails in whole pages, and pieces
  std::int64_t used_pages = 0;      // the same, pieces packed without gaps
  std::int64_t reserved_pages = 0;  // that it may take beside those until it holds granted_tokens

  std::int64_t held_pages() const { return used_pages + reserved_pages; }
};
// Of a stage of these layers, n_generated tokens after a prompt of n_prompt tokens: right after the
// boundary there, when it may hold up to granted_tokens. n_generated is 0 or a multiple of
// kGeneratedBoundary, and granted_tokens at least n_prompt + n_generated.
ExpectedUse expected_use(const SequencePlan& plan, const KvModel& model, const ProfileTable* table,
                         const LayerSpan& span, std::int64_t n_prompt, std::int64_t n_generated,
                         std::int64_t granted_tokens);

}  // namespace spindle::kvstore
