#pragma once
// A virtual clock and what is to happen on it. Events of the same time happen in the order in which
// they were added, so that a run is the same wherever and however often it is repeated.
//
// Thread-safety: none.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace spindle::coordinator::simulation {

class EventQueue {
 public:
  using Event = std::function<void()>;

  std::int64_t now_us() const { return now_us_; }
  bool empty() const { return heap_.empty(); }

  // A time that has passed means now.
  void at(std::int64_t time_us, Event event) {
    heap_.push_back({std::max(time_us, now_us_), next_++, std::move(event)});
    std::push_heap(heap_.begin(), heap_.end(), is_later);
  }
  void after(std::int64_t delay_us, Event event) { at(now_us_ + delay_us, std::move(event)); }

  // Moves the clock to the next event and lets it happen; false when there is none.
  bool step() {
    if (heap_.empty()) return false;
    std::pop_heap(heap_.begin(), heap_.end(), is_later);
    const Entry entry = std::move(heap_.back());
    heap_.pop_back();
    now_us_ = entry.time_us;
    entry.event();
    return true;
  }

 private:
  struct Entry {
    std::int64_t time_us = 0;
    std::uint64_t number = 0;
    Event event;
  };
  static bool is_later(const Entry& a, const Entry& b) {
    return std::pair(a.time_us, a.number) > std::pair(b.time_us, b.number);
  }

  std::int64_t now_us_ = 1;  // 0 means "never" to the scheduler
  std::uint64_t next_ = 0;
  std::vector<Entry> heap_;
};

}  // namespace spindle::coordinator::simulation
