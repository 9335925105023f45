#include "kvstore/page_pool.h"

#include <algorithm>
#include <limits>
#include <string>

namespace spindle::kvstore {

Result<std::unique_ptr<PagePool>> PagePool::create(std::byte* base, std::uint64_t n_bytes,
                                                   std::uint64_t page_bytes) {
  if (page_bytes == 0 || n_bytes < page_bytes) {
    return invalid_argument("a KV budget of " + std::to_string(n_bytes) +
                            " bytes holds no page of " + std::to_string(page_bytes) + " bytes");
  }
  const std::uint64_t n_pages = n_bytes / page_bytes;
  if (n_pages > std::numeric_limits<PageId>::max()) {
    return invalid_argument("a KV budget of " + std::to_string(n_bytes) +
                            " bytes makes more than 2^32 - 1 pages");
  }
  return std::unique_ptr<PagePool>(
      new PagePool(base, page_bytes, static_cast<std::uint32_t>(n_pages)));
}

PagePool::PagePool(std::byte* base, std::uint64_t page_bytes, std::uint32_t n_pages)
    : base_(base), page_bytes_(page_bytes), references_(n_pages) {
  free_.reserve(n_pages);
  for (std::uint32_t i = n_pages; i > 0; --i) free_.push_back(i - 1);
}

Status PagePool::reserve(std::int64_t n_pages) {
  CHECK(n_pages >= 0, "a reservation cannot be negative");
  if (n_pages > n_free() - n_reserved_) {
    return resource_exhausted("the KV pool has " + std::to_string(n_free() - n_reserved_) +
                              " unreserved pages of " + std::to_string(this->n_pages()) + ", " +
                              std::to_string(n_pages) + " were asked for");
  }
  n_reserved_ += n_pages;
  return ok_status();
}

void PagePool::unreserve(std::int64_t n_pages) {
  CHECK(n_pages >= 0 && n_pages <= n_reserved_, "more pages given back than were reserved");
  n_reserved_ -= n_pages;
}

PageId PagePool::allocate() {
  CHECK(n_reserved_ > 0, "a page was taken that was not reserved");
  --n_reserved_;
  const PageId page = free_.back();
  free_.pop_back();
  references_[page] = 1;
  ++n_used_;
  peak_used_ = std::max(peak_used_, n_used_);
  return page;
}

void PagePool::add_reference(PageId page) {
  CHECK(page < references_.size() && references_[page] > 0, "a reference to a free page");
  ++references_[page];
}

bool PagePool::release(PageId page) {
  CHECK(page < references_.size() && references_[page] > 0, "a free page was released");
  if (--references_[page] > 0) return false;
  free_.push_back(page);
  --n_used_;
  return true;
}

void PagePool::check_invariants() const {
  CHECK(n_free() + n_used_ == n_pages(), "free + used = total");
  CHECK(n_reserved_ >= 0 && n_reserved_ <= n_free(), "reserved <= free");
  const auto used = std::count_if(references_.begin(), references_.end(),
                                  [](std::uint32_t count) { return count > 0; });
  CHECK(used == n_used_, "pages with references = used pages");
  for (const PageId page : free_) CHECK(references_[page] == 0, "a free page has a reference");
}

}  // namespace spindle::kvstore
