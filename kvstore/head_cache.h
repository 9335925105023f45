#pragma once
// The cache of one KV head of one sequence: compressed blocks in the sequence's arena, then a tail
// of full-precision pages. Plain data; KvStore owns it and head_move.h says how tokens move from
// the tail to blocks.
//
// Invariants: blocks are in ascending order of positions and all precede tail_first; the tail's
// pages hold the positions [tail_origin, n_tokens of the sequence).

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "kernels/attention.h"
#include "kernels/kv_block.h"
#include "kvstore/page_pool.h"
#include "kvstore/plan/kv_kind.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::kvstore {

// Codebook entries of one side, in chunks that lie in the arena.
struct HeadBook {
  std::vector<const std::byte*> chunks;
  std::int64_t n_filled = 0;  // entries that are not padding

  std::int64_t n_entries() const {
    return static_cast<std::int64_t>(chunks.size()) * kernels::kCodebookChunkEntries;
  }
};

struct BlockCounts {
  std::int64_t n_visible = 0;    // tokens
  std::int64_t n_in_k_book = 0;  // tokens stored, whether still visible or not
  std::int64_t n_in_v_book = 0;
  std::array<std::int32_t, kernels::kKvFormats> n_sides = {};  // of blocks, by format

  // Bit f: some side has the format f, as decode_formats() wants it.
  std::uint32_t format_mask() const {
    std::uint32_t mask = 0;
    for (std::size_t f = 0; f < n_sides.size(); ++f) mask |= n_sides[f] > 0 ? 1U << f : 0U;
    return mask;
  }
  void count(const kernels::KvBlock& block, int sign) {
    n_visible += sign * (block.end - block.first);
    n_sides[static_cast<std::size_t>(block.codec.k)] += sign;
    n_sides[static_cast<std::size_t>(block.codec.v)] += sign;
    if (block.codec.k == kernels::KvFormat::kCodebook) n_in_k_book += sign * block.end;
    if (block.codec.v == kernels::KvFormat::kCodebook) n_in_v_book += sign * block.end;
  }
  bool operator==(const BlockCounts&) const = default;
};

struct HeadCache {
  std::vector<PageId> tail_pages;
  std::vector<std::byte*> tail_data;
  std::int64_t tail_origin = 0;
  std::int64_t tail_first = 0;

  std::vector<kernels::KvBlock> blocks;
  kernels::KvHeadContext context;
  HeadBook k_book;
  HeadBook v_book;
  // Entries of both books by token id, when they are of ids (token_book.h): such a book never holds
  // anything else.
  std::unordered_map<std::int32_t, std::uint16_t> token_entries;
  HeadPlan plan;  // of the last boundary

  // Running sums, so that reports need not walk the blocks.
  std::uint64_t piece_bytes = 0;  // that the blocks, means and books take in the arena
  FormBytes form_bytes = {};      // the same by form; raw ones are kRaw whatever the mode
  BlockCounts counts;

  std::int64_t n_block_tokens() const { return counts.n_visible; }
};

}  // namespace spindle::kvstore
