#pragma once
// Encoded pieces on their way into a sequence's arena: collected, then placed by size, the largest
// first. Sizes divide each other or nearly so, so that next to nothing is left between them.
//
// Keeps its memory from one layer to the next: a prompt of 32k tokens has a million pieces.
// Thread-safety: none; the store's thread.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvstore/encoded_head.h"
#include "kvstore/kv_memory.h"
#include "kvstore/page_pool.h"
#include "kvstore/sequence_arena.h"

namespace spindle::kvstore {

class PiecePlacer {
 public:
  // *place is written by place(), until then it stays where it is. An empty piece has no place.
  void add(Piece piece, const std::byte** place) {
    if (piece.empty()) return;
    group(piece.size()).waiting.push_back({piece.data(), place});
  }
  // Places what was added, with the pages that *n_reserved allows and, beyond them, what the pool
  // still has; adds what is to be copied. False when there is no more: what has a place keeps it.
  // Nothing waits then in either case.
  bool place(SequenceArena& arena, PagePool& pool, std::int64_t* n_reserved,
             std::vector<KvCopy>& copies);

 private:
  struct Waiting {
    const std::byte* source;
    const std::byte** place;
  };
  struct Group {
    std::size_t n_bytes;  // of each
    std::vector<Waiting> waiting;
  };
  Group& group(std::size_t n_bytes);
  static bool place_group(const Group& group, SequenceArena& arena, PagePool& pool,
                          std::int64_t* n_reserved, std::vector<KvCopy>& copies);

  std::vector<Group> groups_;  // by descending size
};

}  // namespace spindle::kvstore
