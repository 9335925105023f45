#pragma once
// StepRecorder: what one rank did, in a ring of fixed size. Off it costs one branch.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels/core/status.h"
#include "worker/trace/trace_record.h"

namespace spindle::worker {

// Nanoseconds of this rank's steady clock.
std::int64_t trace_clock_ns();
std::int64_t trace_clock_ns(std::chrono::steady_clock::time_point at);

// What was recorded, as it is told before the records themselves are asked for.
struct RecordingSummary {
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
  std::size_t n_kept = 0;
  std::uint64_t n_dropped = 0;  // the oldest, when the ring was full
};

// A recording goes from start() to stop() or its own end. Its records stay until drop(), or the
// next start().
//
// Thread-safety: every member may be called from any thread. add() takes a lock that is free but
// for a moment.
class StepRecorder {
 public:
  static constexpr std::size_t kMaxRecords = std::size_t{1} << 20;

  // Whether add() would keep anything: look before making a record.
  bool is_on() const { return on_.load(std::memory_order_relaxed); }

  // Allocates the ring: 1 to kMaxRecords. RESOURCE_EXHAUSTED while one is under way.
  Status start(std::size_t n_records, std::chrono::milliseconds duration);
  // A slice that reaches over an end of the recording is cut there. What lies outside is ignored,
  // and the first record behind the end turns the recorder off.
  void add(TraceRecord record);
  RecordingSummary stop();
  // Kept records from number `first` on, the oldest is 0; at most `count`.
  std::vector<TraceRecord> records(std::size_t first, std::size_t count) const;
  void drop();

 private:
  std::atomic<bool> on_{false};
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<TraceRecord> ring_;
  std::uint64_t n_added_ = 0;  // record i is at i modulo the ring's size
  std::int64_t begin_ns_ = 0;
  std::int64_t end_ns_ = 0;
};

}  // namespace spindle::worker
