#pragma once
// A point in steady time after which a wait must give up. Every blocking call takes one.

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace spindle {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Deadline(Clock::time_point at) : at_(at) {}
  static Deadline after(Clock::duration wait) { return Deadline(Clock::now() + wait); }
  static Deadline after_ms(std::int64_t wait_ms) {
    return after(std::chrono::milliseconds(wait_ms));
  }

  Clock::time_point at() const { return at_; }
  bool passed() const { return Clock::now() >= at_; }
  // Never negative.
  Clock::duration remaining() const {
    return std::max(Clock::duration::zero(), at_ - Clock::now());
  }

 private:
  Clock::time_point at_;
};

}  // namespace spindle
