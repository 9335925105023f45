#pragma once
// What a boundary makes of one head: its tokens' bytes in the plan's codec, waiting in the memory's
// scratch (kv_memory.h) for the places that the store will give them.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kv_block.h"
#include "kvstore/head_move.h"

namespace spindle::kvstore {

// Thresholds of the codebook (SpindleKV, section 3).
inline constexpr float kCodebookThetaK = 0.98F;
inline constexpr float kCodebookThetaV = 0.95F;

// Where bytes wait; an address of the memory's own kind. Empty: there is no such piece.
using Piece = std::span<const std::byte>;

struct EncodedSide {
  Piece codes;
  Piece scales;
};
struct EncodedBlock {
  kernels::KvBlock view;  // pointers are set when the pieces are placed
  EncodedSide k;
  EncodedSide v;
  Piece positions;
};
// New entries of a book in whole chunks, the last one filled up with zero vectors, which match
// nothing. A fork may share the book's last chunk, so they begin one of their own.
struct EncodedEntries {
  Piece chunks;
  std::int64_t n_filled = 0;

  bool empty() const { return n_filled == 0; }
};
struct EncodedHead {
  HeadMove move;
  std::vector<EncodedBlock> blocks;  // after those that the head has
  Piece k_mean;                      // when the head has none yet
  Piece v_mean;
  EncodedEntries k_entries;
  EncodedEntries v_entries;
  std::vector<std::int32_t> entry_ids;  // of the new entries of both sides, when they are of ids
};

}  // namespace spindle::kvstore
