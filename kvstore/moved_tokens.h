#pragma once
// Which positions a boundary takes from one head, ascending: a range, some of a list, a range. No
// copy of them is made, since a long prompt has millions of them in all heads together.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace spindle::kvstore {

// Does not own the list. Thread-safety: a plain value.
class MovedTokens {
 public:
  MovedTokens() = default;
  // [first, first_end), `list`, [last, last_end), all ascending.
  MovedTokens(std::int64_t first, std::int64_t first_end, std::span<const std::int32_t> list,
              std::int64_t last, std::int64_t last_end)
      : first_(static_cast<std::int32_t>(first)),
        n_first_(static_cast<std::size_t>(first_end - first)),
        list_(list),
        last_(static_cast<std::int32_t>(last)),
        n_last_(static_cast<std::size_t>(last_end - last)) {}

  std::size_t size() const { return n_first_ + list_.size() + n_last_; }
  bool empty() const { return size() == 0; }
  // Nothing is left out between the first and the last.
  bool is_consecutive() const {
    return empty() || static_cast<std::size_t>((*this)[size() - 1] - (*this)[0]) == size() - 1;
  }
  std::int32_t operator[](std::size_t i) const {
    if (i < n_first_) return first_ + static_cast<std::int32_t>(i);
    i -= n_first_;
    if (i < list_.size()) return list_[i];
    return last_ + static_cast<std::int32_t>(i - list_.size());
  }
  // Positions [begin, end) of them.
  void copy(std::size_t begin, std::size_t end, std::int32_t* out) const {
    std::size_t at = begin;
    if (const std::size_t stop = std::min(end, n_first_); at < stop) {
      std::iota(out, out + (stop - at), first_ + static_cast<std::int32_t>(at));
      out += stop - at;
      at = stop;
    }
    if (const std::size_t stop = std::min(end, n_first_ + list_.size()); at < stop) {
      out = std::copy_n(list_.begin() + static_cast<std::ptrdiff_t>(at - n_first_), stop - at, out);
      at = stop;
    }
    if (at < end) std::iota(out, out + (end - at), (*this)[at]);
  }
  std::vector<std::int32_t> to_vector() const {
    std::vector<std::int32_t> all(size());
    copy(0, all.size(), all.data());
    return all;
  }

 private:
  std::int32_t first_ = 0;
  std::size_t n_first_ = 0;
  std::span<const std::int32_t> list_;
  std::int32_t last_ = 0;
  std::size_t n_last_ = 0;
};

}  // namespace spindle::kvstore
