#pragma once
// What a stage knows of each open sequence, found by number: rank 0 counts them from 1, so that a
// vector does.
//
// Thread-safety: none.

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace spindle::coordinator::simulation {

template <typename T>
class SequenceTable {
 public:
  // Null for one that is not open.
  T* find(std::uint64_t sequence) {
    return sequence < entries_.size() ? entries_[sequence].get() : nullptr;
  }
  const T* find(std::uint64_t sequence) const {
    return sequence < entries_.size() ? entries_[sequence].get() : nullptr;
  }
  // It must not be open.
  T& open(std::uint64_t sequence, T entry = {}) {
    if (sequence >= entries_.size()) entries_.resize(sequence + 1);
    entries_[sequence] = std::make_unique<T>(std::move(entry));
    ++n_open_;
    return *entries_[sequence];
  }
  // It must be open.
  void close(std::uint64_t sequence) {
    entries_[sequence].reset();
    --n_open_;
  }
  std::size_t n_open() const { return n_open_; }

  // (number, entry) of all that are open, in order.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i]) visit(static_cast<std::uint64_t>(i), *entries_[i]);
    }
  }

 private:
  std::vector<std::unique_ptr<T>> entries_;
  std::size_t n_open_ = 0;
};

}  // namespace spindle::coordinator::simulation
