#pragma once
// A request's own table of layer 0, for models whose table of the whole vocabulary is too large
// (KvHeadContext::k_tokens is null): a codebook whose entries are the f16 K before RoPE and V of
// the request's distinct token ids, with magnitude 1, so that whatever reads codebooks reads it.
// The limit case of SpindleKV's shallow codebook: V is the very one of the tail, K is off by what
// undoing RoPE rounds, wherever its token stands.
//
// Entries of both sides are in the order in which their ids were first seen, and an id keeps its
// entry for as long as the head lives. Decided by ids alone, before any row is looked at.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kvstore/head_cache.h"
#include "kvstore/head_move.h"

namespace spindle::kvstore {

struct TokenMatch {
  // Entries and references take fewer bytes than raw blocks and fit 16 bits. Otherwise nothing
  // below is set and the tokens become raw blocks, which are as exact.
  bool pays = false;
  std::vector<std::uint16_t> refs;  // [n tokens], of K and of V
  // Of the ids that have no entry yet, in the order of their entries: the first of the tokens.
  std::vector<std::int32_t> new_ids;
  std::vector<std::int32_t> new_tokens;  // positions
};
// `tokens` are positions in the tail, ascending (HeadMove::tokens); task.by_id is set.
TokenMatch match_token_ids(const HeadCache& head, const HeadTask& task,
                           std::span<const std::int32_t> tokens,
                           const kernels::KvPageLayout& layout);

}  // namespace spindle::kvstore
