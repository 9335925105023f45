#pragma once
// What a sequence may still take of a stage's pages until it holds its granted tokens: what the
// store reserves after a boundary (kv_store.h), and what the sizing of a cluster expects of it
// (cluster/coordinator/sizing.h).
//
// Thread-safety: plain values and pure functions.

#include <cstdint>

#include "kvstore/plan/kv_plan.h"
#include "kvstore/plan/kv_shape.h"

namespace spindle::kvstore {

// What a compressed piece takes of its page.
constexpr std::uint64_t arena_bytes(std::uint64_t piece_bytes) {
  return (piece_bytes + 63) / 64 * 64;
}

// First position of the tail after a boundary at n_tokens: `recent` tokens or a few more, in whole
// pages; all of them are encoded when recent is 0.
std::int64_t tail_begin(std::int64_t tail_origin, std::int64_t tail_first, int recent,
                        std::int64_t n_tokens);

// Whether a head under this plan keeps a mean of the side stored in `format`.
bool wants_mean(const HeadPlan& plan, kernels::KvFormat format);

// The full-precision tail of one head.
struct TailState {
  std::int64_t origin = 0;  // position of its first page
  std::int64_t first = 0;   // tokens before this have left it
  std::int64_t n_pages = 0;
  std::int64_t n_own_pages = 0;  // that no other sequence shares
  bool has_k_mean = false;
  bool has_v_mean = false;
  bool by_id = false;  // the head keeps a table of its own token ids (token_book.h)
};

// Where a sequence is and what is still to come, as StageBoundary says it.
struct Ahead {
  std::int64_t n_tokens = 0;
  std::int64_t granted_tokens = 0;
  int sinks = 0;
  int recent = 0;
  std::int64_t prompt_left = 0;
  int boundaries_left = 0;
  bool forks = false;

  // Whether all that comes are the boundaries of generated tokens, kGeneratedBoundary from this one
  // and from each other: tails then have the same length after each, and only whole blocks leave
  // them.
  bool only_generates() const { return prompt_left == 0 && boundaries_left == 0; }
};

struct PieceFormat {
  KvShape shape;
  bool wide_positions = false;
  bool wide_ids = false;
};

// Whether the tail only grows: tokens in full precision that all stay. Its n_own_pages do not
// matter.
bool tail_only_grows(const HeadPlan& plan, const Ahead& ahead);
// Pages of the tail, of one head.
std::int64_t future_tail_pages(const KvShape& shape, const HeadPlan& plan, const TailState& tail,
                               const Ahead& ahead);
// Bytes of every token of one head that may yet leave the tail, at what its format takes of pages.
std::uint64_t future_piece_bytes(const PieceFormat& format, const HeadPlan& plan,
                                 const TailState& tail, const Ahead& ahead);
// Pages for the sum of those bytes over the heads of a stage.
constexpr std::int64_t future_piece_pages(const KvShape& shape, std::uint64_t bytes) {
  if (bytes == 0) return 0;
  const std::uint64_t page = shape.page_bytes();
  return static_cast<std::int64_t>((bytes + page - 1) / page) + kPackingPages;
}

}  // namespace spindle::kvstore
