#pragma once
// The pages of one simulated stage: which are taken, by how many sequences each, and how many are
// promised. The same rules as kvstore/page_pool.h without any memory behind them.
//
// Invariant: used + reserved <= capacity; a page's reference count is 0 exactly when it is free.
// Thread-safety: none.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::coordinator::simulation {

using PageNumber = std::uint32_t;

class PageBook {
 public:
  explicit PageBook(std::int64_t n_pages) : n_pages_(n_pages) {}

  // RESOURCE_EXHAUSTED, with nothing changed, when fewer than n are free and unreserved.
  Status reserve(std::int64_t n) {
    if (n > n_pages_ - n_used_ - n_reserved_) {
      return resource_exhausted(std::to_string(n) + " pages are to be reserved, " +
                                std::to_string(n_used_) + " are used and " +
                                std::to_string(n_reserved_) + " reserved of " +
                                std::to_string(n_pages_));
    }
    n_reserved_ += n;
    return ok_status();
  }
  void unreserve(std::int64_t n) { n_reserved_ -= n; }

  // Of the reserved ones.
  PageNumber take() {
    --n_reserved_;
    ++n_used_;
    if (free_.empty()) {
      references_.push_back(1);
      return static_cast<PageNumber>(references_.size() - 1);
    }
    const PageNumber page = free_.back();
    free_.pop_back();
    references_[page] = 1;
    return page;
  }
  void share(PageNumber page) { ++references_[page]; }
  // Whether the page is free now.
  bool release(PageNumber page) {
    if (--references_[page] > 0) return false;
    --n_used_;
    free_.push_back(page);
    return true;
  }

  std::uint32_t references(PageNumber page) const { return references_[page]; }
  std::int64_t n_pages() const { return n_pages_; }
  std::int64_t n_used() const { return n_used_; }
  std::int64_t n_reserved() const { return n_reserved_; }
  const std::vector<std::uint32_t>& all_references() const { return references_; }

 private:
  std::int64_t n_pages_;
  std::int64_t n_used_ = 0;
  std::int64_t n_reserved_ = 0;
  std::vector<std::uint32_t> references_;  // of pages that were ever taken
  std::vector<PageNumber> free_;
};

}  // namespace spindle::coordinator::simulation
