#pragma once
// The KV memory of one rank (kv_memory.h) cut into pages of equal size, handed out by number. The
// pool knows their addresses and never what is there.
//
// A page has a reference count so that forked sequences can share it; it returns to the pool when
// the last owner releases it.
//
// Reservations make promises keepable: reserve() sets pages aside without choosing them, allocate()
// draws from what the caller reserved.
//
// Invariants, after every call: n_free + n_used = n_pages, n_reserved <= n_free, and the reference
// count of a page is 0 exactly when it is free.
// Thread-safety: none; one stage thread owns the pool.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::kvstore {

using PageId = std::uint32_t;

class PagePool {
 public:
  // As many pages of page_bytes as fit into n_bytes, the first one at `base`. INVALID_ARGUMENT when
  // not one fits or there are more than 2^32 - 1.
  static Result<std::unique_ptr<PagePool>> create(std::byte* base, std::uint64_t n_bytes,
                                                  std::uint64_t page_bytes);
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // RESOURCE_EXHAUSTED, with nothing changed, when fewer than n_pages are free and unreserved.
  Status reserve(std::int64_t n_pages);
  void unreserve(std::int64_t n_pages);
  // One page of those reserved by the caller, with one reference. Its content is unspecified.
  PageId allocate();
  void add_reference(PageId page);
  // Drops one reference; the last one frees the page, and then the answer is true.
  bool release(PageId page);

  std::uint32_t references(PageId page) const { return references_[page]; }

  std::byte* address(PageId page) const {
    return base_ + static_cast<std::uint64_t>(page) * page_bytes_;
  }

  std::uint64_t page_bytes() const { return page_bytes_; }
  std::int64_t n_pages() const { return static_cast<std::int64_t>(references_.size()); }
  std::int64_t n_free() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t n_used() const { return n_used_; }
  std::int64_t n_reserved() const { return n_reserved_; }
  std::int64_t peak_used() const { return peak_used_; }
  // Walks every page; for tests and debug builds.
  void check_invariants() const;

 private:
  PagePool(std::byte* base, std::uint64_t page_bytes, std::uint32_t n_pages);

  std::byte* base_;
  std::uint64_t page_bytes_;
  std::vector<std::uint32_t> references_;  // [n_pages]
  std::vector<PageId> free_;               // a stack: the page freed last is reused first
  std::int64_t n_used_ = 0;
  std::int64_t n_reserved_ = 0;
  std::int64_t peak_used_ = 0;
};

}  // namespace spindle::kvstore
