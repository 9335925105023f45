#pragma once
// Which tokens of one KV head a boundary moves: out of the full-precision tail into blocks, or out
// of a streaming window. Decided before anything is encoded, so that the store knows what it needs
// before it changes anything.
//
// Thread-safety: plain values and pure functions.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/kv_block.h"
#include "kvstore/head_cache.h"
#include "kvstore/moved_tokens.h"
#include "kvstore/plan/kv_plan.h"
#include "kvstore/plan/kv_projection.h"

namespace spindle::kvstore {

// Whether a head under `plan` keeps a table of its own token ids, since there is none of the whole
// vocabulary (token_book.h).
bool is_by_id(const HeadCache& head, const HeadPlan& plan);

struct HeadTask {
  HeadPlan plan;
  int sinks = 0;
  int recent = 0;
  std::int64_t n_tokens = 0;  // at the boundary
  // EVICT at a prompt boundary: the candidates that stay, ascending positions. Unset: everything
  // that leaves the tail stays (generated tokens).
  bool has_selection = false;
  std::span<const std::int32_t> kept;  // without doubles
  // A plan of token ids without a table: kCodebook in `plan`, with one entry for each id
  // (token_book.h).
  bool by_id = false;
  // Ids of the positions from tail_origin on, when holds_ids().
  std::span<const std::int32_t> token_ids;

  void set_plan(const HeadCache& head, const HeadPlan& wanted);
  bool holds_ids() const { return by_id || plan.codec.k == kernels::KvFormat::kToken; }
};

struct HeadMove {
  bool changes = false;
  std::int64_t tail_origin = 0;
  std::int64_t tail_first = 0;
  MovedTokens tokens;           // that are encoded; they refer to the task's `kept`
  std::size_t n_sinks = 0;      // of them, in raw blocks of their own
  bool with_positions = false;  // of the other blocks
  // STREAM: blocks that fall out of the window, and slots of the one after them.
  std::size_t first_expired_block = 0;
  std::size_t n_expired_blocks = 0;
  int first_of_next_block = 0;
};
HeadMove move_head(const HeadCache& head, const HeadTask& task);

// How a block of n <= 32 tokens is stored under a codec that is not kCodebook. KIVI's groups are of
// 32 tokens, so what is left over stays raw.
struct BlockForm {
  kernels::KvCodec codec;
  int capacity = kernels::kKvBlockTokens;
};
BlockForm block_form(kernels::KvCodec codec, std::int64_t n);

// Whether a codebook keeps a tile of n_rows: its references and the chunks that its new entries add
// must take fewer bytes than the fallback. n_stored entries lie in the arena; the book had n_before
// entries before the tile and n_after with it.
bool codebook_pays(kernels::KvFormat fallback, kernels::KvSide side,
                   const kernels::KvPageLayout& layout, std::int64_t n_rows, std::int64_t n_stored,
                   std::int64_t n_before, std::int64_t n_after);
constexpr std::uint64_t codebook_chunk_bytes(int head_dim) {
  return 2ULL * kernels::kCodebookChunkEntries * static_cast<std::uint64_t>(head_dim);
}

// How many pieces there are of each size, the largest first.
using PieceSizes = std::map<std::uint64_t, std::int64_t, std::greater<>>;
// Adds those of the pieces that the move places, codebooks as their fallback: at most what it
// takes.
void append_piece_sizes(const HeadCache& head, const HeadTask& task, const HeadMove& move,
                        const kernels::KvPageLayout& layout, PieceSizes& sizes);

}  // namespace spindle::kvstore
