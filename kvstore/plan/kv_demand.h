#pragma once
// How many pages a sequence may take on a stage: rank 0 commits that much before it opens one
// (cluster/coordinator/kv_ledger.h), and the stage reserves as much (kv_store.h), so that no later
// call can run out. An upper bound whatever the boundaries' plans turn out to be.
//
// Thread-safety: plain values and pure functions.

#include <algorithm>
#include <cstdint>

#include "kvstore/plan/kv_shape.h"

namespace spindle::kvstore {

struct KvDemand {
  std::int64_t prompt_tokens = 0;
  std::int64_t max_tokens = 0;  // of one choice's cache, prompt included; or those granted at first
  int n_choices = 1;            // all but the first fork from it at the end of the prompt
  // Tokens leave the tail at boundaries: n_boundaries of the prompt, then every
  // kGeneratedBoundary generated tokens. After the prompt's last one the tail holds about
  // tail_tokens.
  bool compresses = false;
  int n_boundaries = 0;
  std::int64_t tail_tokens = 0;
  // Continues a kept sequence: tokens that come from it, of which those before tail_begin are in no
  // tail.
  std::int64_t cached_tokens = 0;
  std::int64_t tail_begin = 0;
};

// Of the first choice, or of a fork beside what it shares.
constexpr std::int64_t reserve_pages(const KvShape& shape, int n_layers, const KvDemand& demand,
                                     bool is_fork) {
  if (!demand.compresses) {
    const std::int64_t n_shared = is_fork ? demand.prompt_tokens : demand.cached_tokens;
    return stage_pages(shape, n_layers, demand.max_tokens) -
           shared_stage_pages(shape, n_layers, n_shared);
  }
  std::int64_t pages = stage_pages(shape, n_layers, demand.max_tokens - demand.prompt_tokens);
  if (!is_fork) {
    pages += stage_pages(shape, n_layers, demand.prompt_tokens - demand.tail_begin);
  }
  // The first one to let go of a shared page gets nothing for it.
  if (demand.n_choices > 1) {
    pages += stage_pages(shape, n_layers, std::min(demand.tail_tokens, demand.prompt_tokens));
  }
  // Packed pieces take no more than the pages they replace, but for position lists and the last,
  // partly filled block of each boundary; a tail that begins anywhere, for a page at each end.
  constexpr std::int64_t kPositionBytes = 128;
  const auto page_bytes = static_cast<std::int64_t>(shape.page_bytes());
  pages += (pages * kPositionBytes + page_bytes - 1) / page_bytes;
  const std::int64_t n_tables = std::int64_t{n_layers} * shape.n_kv_heads;
  return pages + n_tables * (2 + (is_fork ? 0 : demand.n_boundaries)) + kPackingPages;
}

// What `n_tokens` more may take of a sequence that was granted fewer at first, beside what it has
// reserved: an upper bound, since only the stage knows how far its tails have rolled on. Where
// tokens leave the tail they may be in it and in pieces.
constexpr std::int64_t grow_pages(const KvShape& shape, int n_layers, const KvDemand& demand,
                                  std::int64_t granted_tokens, std::int64_t n_tokens) {
  if (!demand.compresses) {
    return stage_pages(shape, n_layers, granted_tokens + n_tokens) -
           stage_pages(shape, n_layers, granted_tokens);
  }
  const std::int64_t n_tables = std::int64_t{n_layers} * shape.n_kv_heads;
  const std::int64_t pages = 2 * stage_pages(shape, n_layers, n_tokens);
  return pages + pages / 8 + n_tables + kPackingPages;
}

}  // namespace spindle::kvstore
