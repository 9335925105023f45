#pragma once
// Pages of the pool that hold one sequence's compressed pieces: codes, scales, positions, means and
// codebook entries of all its layers and heads, packed one behind the other. A piece never crosses
// a page. The sizes that kernels/kv_block.h gives divide a page or nearly so, so placing the
// largest first leaves next to no gaps.
//
// Owner of: references to its pages. The pool outlives it.
// Invariant: a page is held while a piece in it is live, and given back when the last one goes.
// Thread-safety: none; the store's thread.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvstore/page_pool.h"
#include "kvstore/plan/kv_projection.h"

namespace spindle::kvstore {

class SequenceArena {
 public:
  explicit SequenceArena(PagePool& pool) : pool_(&pool) {}
  SequenceArena(SequenceArena&&) = default;
  SequenceArena& operator=(SequenceArena&&) = default;
  SequenceArena(const SequenceArena&) = delete;
  SequenceArena& operator=(const SequenceArena&) = delete;

  // `bytes` (1 to a page), aligned to 64, with unspecified content. Takes at most one page, of the
  // *n_reserved that the caller has; null when it needs one and none is left.
  std::byte* allocate(std::uint64_t bytes, std::int64_t* n_reserved) {
    return allocate_run(bytes, 1, n_reserved).first;
  }
  // `n` pieces, one behind the other: the same places as from n calls of allocate().
  struct Run {
    std::byte* first = nullptr;
    std::int64_t n = 0;
    std::uint64_t stride = 0;
  };
  // At most `most` pieces of one size, as many as lie in the place that is best for the first.
  Run allocate_run(std::uint64_t bytes, std::int64_t most, std::int64_t* n_reserved);
  // Gives back a piece of this arena; answers the pages that became free.
  std::int64_t release(const std::byte* piece, std::uint64_t bytes);
  // A second owner of all live pieces. Neither writes into shared pages from then on.
  SequenceArena fork();
  // Gives back everything; answers the pages that became free in the pool.
  std::int64_t clear();

  std::int64_t n_pages() const { return static_cast<std::int64_t>(pages_.size()); }
  std::uint64_t live_bytes() const { return live_bytes_; }
  void append_pages(std::vector<PageId>& pages) const;

  // Allocates on paper: how many pages a series of allocations would take, in that order.
  class Trial {
   public:
    // n pieces of one size. Answers the pages taken so far.
    std::int64_t allocate(std::uint64_t bytes, std::int64_t n = 1);

   private:
    friend class SequenceArena;
    std::uint64_t page_bytes_ = 0;
    std::vector<std::uint64_t> gaps_;  // ascending
    std::int64_t n_pages_ = 0;
  };
  Trial trial() const;

 private:
  struct Page {
    PageId id = 0;
    std::uint64_t live_bytes = 0;
  };
  struct Gap {
    std::uint64_t bytes = 0;
    std::size_t page = 0;  // index in pages_
    std::uint64_t offset = 0;
  };

  void add_gap(Gap gap);
  std::size_t page_of(const std::byte* piece) const;
  void remove_page(std::size_t index);

  PagePool* pool_;
  std::vector<Page> pages_;
  std::vector<Gap> gaps_;  // ascending by (bytes, page, offset)
  std::uint64_t live_bytes_ = 0;
};

}  // namespace spindle::kvstore
