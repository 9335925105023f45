#include "kvstore/sequence_arena.h"

#include <algorithm>
#include <tuple>

#include "kernels/core/check.h"

namespace spindle::kvstore {

SequenceArena::Run SequenceArena::allocate_run(std::uint64_t bytes, std::int64_t most,
                                               std::int64_t* n_reserved) {
  const std::uint64_t size = arena_bytes(bytes);
  CHECK(bytes > 0 && size <= pool_->page_bytes(), "a piece fits a page");
  auto gap = std::find_if(gaps_.begin(), gaps_.end(),
                          [size](const Gap& candidate) { return candidate.bytes >= size; });
  if (gap == gaps_.end()) {
    if (*n_reserved == 0) return {};
    pages_.push_back({pool_->allocate(), 0});
    --*n_reserved;
    gap = gaps_.insert(gaps_.end(), Gap{pool_->page_bytes(), pages_.size() - 1, 0});
  }
  const Gap taken = *gap;
  gaps_.erase(gap);
  // What is left of the best gap is the best one for the next piece, while it fits.
  const std::int64_t n = std::min(most, static_cast<std::int64_t>(taken.bytes / size));
  const std::uint64_t all = static_cast<std::uint64_t>(n) * size;
  if (taken.bytes > all) add_gap({taken.bytes - all, taken.page, taken.offset + all});
  Page& page = pages_[taken.page];
  page.live_bytes += all;
  live_bytes_ += all;
  return {pool_->address(page.id) + taken.offset, n, size};
}

void SequenceArena::add_gap(Gap gap) {
  // Neighbours become one, or pieces of changing sizes would crumble the page.
  std::erase_if(gaps_, [&gap](const Gap& other) {
    if (other.page != gap.page) return false;
    if (other.offset + other.bytes != gap.offset && gap.offset + gap.bytes != other.offset) {
      return false;
    }
    gap.offset = std::min(gap.offset, other.offset);
    gap.bytes += other.bytes;
    return true;
  });
  const auto key = [](const Gap& g) { return std::tuple(g.bytes, g.page, g.offset); };
  gaps_.insert(std::find_if(gaps_.begin(), gaps_.end(),
                            [&](const Gap& other) { return key(other) > key(gap); }),
               gap);
}

std::size_t SequenceArena::page_of(const std::byte* piece) const {
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    const std::byte* begin = pool_->address(pages_[i].id);
    if (piece >= begin && piece < begin + pool_->page_bytes()) return i;
  }
  CHECK(false, "a piece of another arena");
  return 0;
}

void SequenceArena::remove_page(std::size_t index) {
  std::erase_if(gaps_, [index](const Gap& gap) { return gap.page == index; });
  for (Gap& gap : gaps_) {
    if (gap.page > index) --gap.page;
  }
  pages_.erase(pages_.begin() + static_cast<std::ptrdiff_t>(index));
}

std::int64_t SequenceArena::release(const std::byte* piece, std::uint64_t bytes) {
  const std::uint64_t size = arena_bytes(bytes);
  const std::size_t index = page_of(piece);
  Page& page = pages_[index];
  CHECK(page.live_bytes >= size && live_bytes_ >= size, "a piece is released once");
  page.live_bytes -= size;
  live_bytes_ -= size;
  if (page.live_bytes > 0) {
    // A page that a fork shares must not change.
    const auto offset = static_cast<std::uint64_t>(piece - pool_->address(page.id));
    if (pool_->references(page.id) == 1) add_gap({size, index, offset});
    return 0;
  }
  const bool is_free = pool_->release(page.id);
  remove_page(index);
  return is_free ? 1 : 0;
}

SequenceArena SequenceArena::fork() {
  SequenceArena copy(*pool_);
  gaps_.clear();
  for (const Page& page : pages_) pool_->add_reference(page.id);
  copy.pages_ = pages_;
  copy.live_bytes_ = live_bytes_;
  return copy;
}

std::int64_t SequenceArena::clear() {
  std::int64_t n_free = 0;
  for (const Page& page : pages_) n_free += pool_->release(page.id) ? 1 : 0;
  pages_.clear();
  gaps_.clear();
  live_bytes_ = 0;
  return n_free;
}

void SequenceArena::append_pages(std::vector<PageId>& pages) const {
  for (const Page& page : pages_) pages.push_back(page.id);
}

SequenceArena::Trial SequenceArena::trial() const {
  Trial trial;
  trial.page_bytes_ = pool_->page_bytes();
  for (const Gap& gap : gaps_) trial.gaps_.push_back(gap.bytes);
  return trial;
}

std::int64_t SequenceArena::Trial::allocate(std::uint64_t bytes, std::int64_t n) {
  const std::uint64_t size = arena_bytes(bytes);
  while (n > 0) {
    const auto gap = std::lower_bound(gaps_.begin(), gaps_.end(), size);
    std::uint64_t room = page_bytes_;
    if (gap == gaps_.end()) {
      ++n_pages_;
    } else {
      room = *gap;
      gaps_.erase(gap);
    }
    // What is left of the best gap is the best one for the next piece, while it fits.
    const std::int64_t n_here = std::min(n, static_cast<std::int64_t>(room / size));
    n -= n_here;
    room -= static_cast<std::uint64_t>(n_here) * size;
    if (room > 0) gaps_.insert(std::lower_bound(gaps_.begin(), gaps_.end(), room), room);
  }
  return n_pages_;
}

}  // namespace spindle::kvstore
