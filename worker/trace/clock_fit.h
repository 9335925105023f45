#pragma once
// How one rank's steady clock relates to rank 0's, from messages there and back. Pure.

#include <cstdint>
#include <optional>
#include <span>

namespace spindle::worker {

// One message to a rank and its reply: sent and received by rank 0's clock, answered by the rank's.
struct ClockSample {
  std::int64_t sent_ns = 0;
  std::int64_t answered_ns = 0;
  std::int64_t received_ns = 0;
};

// At `rank_ns` of the rank's clock it was ahead of rank 0's by offset_ns, give or take error_ns.
struct ClockReading {
  std::int64_t rank_ns = 0;
  std::int64_t offset_ns = 0;
  std::int64_t error_ns = 0;
};

// Of the fastest message: the rank answered somewhere between its sending and its return, so half
// of that time bounds the error, however unequal both ways are. Empty without samples that make
// sense.
std::optional<ClockReading> best_reading(std::span<const ClockSample> samples);

// Two readings, before and after a recording, and a straight line between them: clocks of two hosts
// run at slightly different speeds.
struct ClockFit {
  ClockReading begin;
  ClockReading end;

  // A time of the rank's clock, by rank 0's. Never decreases while rank_ns increases.
  std::int64_t to_rank0(std::int64_t rank_ns) const;
  // Bounds the error of to_rank0 between both readings, as long as the speeds stay what they are.
  std::int64_t error_ns() const;
};

}  // namespace spindle::worker
