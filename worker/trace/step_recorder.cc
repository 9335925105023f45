#include "worker/trace/step_recorder.h"

#include <algorithm>
#include <string>

namespace spindle::worker {

std::int64_t trace_clock_ns(std::chrono::steady_clock::time_point at) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(at.time_since_epoch()).count();
}

std::int64_t trace_clock_ns() { return trace_clock_ns(std::chrono::steady_clock::now()); }

Status StepRecorder::start(std::size_t n_records, std::chrono::milliseconds duration) {
  if (n_records < 1 || n_records > kMaxRecords) {
    return invalid_argument("a recording keeps 1 to " + std::to_string(kMaxRecords) + " events");
  }
  const std::lock_guard lock(mutex_);
  const std::int64_t now = trace_clock_ns();
  if (on_.load(std::memory_order_relaxed) && now < end_ns_) {
    return resource_exhausted("a recording is under way");
  }
  ring_.assign(n_records, {});
  ring_.shrink_to_fit();
  n_added_ = 0;
  begin_ns_ = now;
  end_ns_ = now + std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
  on_.store(true, std::memory_order_relaxed);
  return ok_status();
}

void StepRecorder::add(TraceRecord record) {
  const std::lock_guard lock(mutex_);
  if (!on_.load(std::memory_order_relaxed)) return;
  if (record.begin_ns >= end_ns_) {
    on_.store(false, std::memory_order_relaxed);
    return;
  }
  const std::int64_t end = std::min(record.begin_ns + record.duration_ns, end_ns_);
  if (end < begin_ns_) return;
  record.begin_ns = std::max(record.begin_ns, begin_ns_);
  record.duration_ns = end - record.begin_ns;
  ring_[n_added_ % ring_.size()] = record;
  ++n_added_;
}

RecordingSummary StepRecorder::stop() {
  const std::lock_guard lock(mutex_);
  on_.store(false, std::memory_order_relaxed);
  end_ns_ = std::min(end_ns_, trace_clock_ns());
  RecordingSummary summary;
  summary.begin_ns = begin_ns_;
  summary.end_ns = end_ns_;
  summary.n_kept = static_cast<std::size_t>(std::min<std::uint64_t>(n_added_, ring_.size()));
  summary.n_dropped = n_added_ - summary.n_kept;
  return summary;
}

std::vector<TraceRecord> StepRecorder::records(std::size_t first, std::size_t count) const {
  const std::lock_guard lock(mutex_);
  std::vector<TraceRecord> out;
  const auto n_kept = static_cast<std::size_t>(std::min<std::uint64_t>(n_added_, ring_.size()));
  if (first >= n_kept) return out;
  count = std::min(count, n_kept - first);
  out.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    out.push_back(ring_[(n_added_ - n_kept + first + i) % ring_.size()]);
  }
  return out;
}

void StepRecorder::drop() {
  const std::lock_guard lock(mutex_);
  on_.store(false, std::memory_order_relaxed);
  ring_ = {};
  n_added_ = 0;
}

}  // namespace spindle::worker
