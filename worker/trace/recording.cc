#include "worker/trace/recording.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <string>
#include <utility>

#include "worker/trace/trace_messages.h"

namespace spindle::worker {
namespace {

constexpr std::int64_t kOrderMs = 5000;
// Round trips to a rank: the first ones wake its thread up, and the fastest counts.
constexpr int kRoundTrips = 64;
constexpr std::int64_t kReadClockMs = 1000;
// For the slices that the end of the recording cuts: they are recorded when they end.
constexpr std::chrono::milliseconds kLastSlices{60};

// False when it was asked to stop.
bool wait(std::chrono::milliseconds duration, const std::stop_token& stop) {
  std::mutex mutex;
  std::condition_variable_any nobody;
  std::unique_lock lock(mutex);
  nobody.wait_for(lock, stop, duration, [] { return false; });
  return !stop.stop_requested();
}

control::Order order_of(const RecordingOptions& options) {
  control::Order order;
  control::StartRecording& start = *order.mutable_start_recording();
  start.set_max_records(static_cast<std::uint32_t>(options.max_records));
  start.set_duration_ms(static_cast<std::uint32_t>(options.duration.count()));
  return order;
}

}  // namespace

bool carry_out(const control::Order& order, StepRecorder& recorder, control::OrderReply& reply) {
  switch (order.what_case()) {
    case control::Order::kReadClock:
      reply.set_clock_ns(trace_clock_ns());
      return true;
    case control::Order::kStartRecording: {
      const control::StartRecording& start = order.start_recording();
      reply.set_error(
          recorder.start(start.max_records(), std::chrono::milliseconds(start.duration_ms()))
              .message());
      return true;
    }
    case control::Order::kStopRecording: {
      const RecordingSummary summary = recorder.stop();
      reply.set_n_kept(summary.n_kept);
      reply.set_n_dropped(summary.n_dropped);
      reply.set_begin_ns(summary.begin_ns);
      reply.set_end_ns(summary.end_ns);
      return true;
    }
    case control::Order::kFetchRecords:
      encode(
          recorder.records(order.fetch_records().first(),
                           std::min<std::size_t>(order.fetch_records().count(), kRecordsPerReply)),
          reply);
      return true;
    case control::Order::kDropRecording:
      recorder.drop();
      return true;
    default:
      return false;
  }
}

Result<Trace> ClusterRecorder::record(const RecordingOptions& options,
                                      const std::stop_token& stop) {
  if (under_way_.exchange(true)) return resource_exhausted("a recording is under way");
  auto trace = record_all(options, stop);
  control::Order drop;
  drop.set_drop_recording(true);
  for (int rank = 0; rank < client_.n_ranks(); ++rank) {
    // What cannot be dropped ends by itself, and the next recording takes its place.
    static_cast<void>(client_.ask(rank, drop, Deadline::after_ms(kOrderMs)));
  }
  under_way_ = false;
  return trace;
}

Result<ClockReading> ClusterRecorder::read_clock(int rank) {
  if (rank == 0) return ClockReading{.rank_ns = trace_clock_ns()};
  control::Order order;
  order.set_read_clock(true);
  std::vector<ClockSample> samples;
  const Deadline deadline = Deadline::after_ms(kReadClockMs);
  while (samples.size() < kRoundTrips && !deadline.passed()) {
    ClockSample sample;
    sample.sent_ns = trace_clock_ns();
    const auto reply = client_.ask(rank, order, Deadline::after_ms(kOrderMs));
    sample.received_ns = trace_clock_ns();
    if (!reply.ok()) return reply.status();
    sample.answered_ns = reply->clock_ns();
    samples.push_back(sample);
  }
  const auto reading = best_reading(samples);
  if (!reading) return internal_error("the clock of rank " + std::to_string(rank));
  return *reading;
}

Status ClusterRecorder::collect(RankTrace& rank) {
  control::Order order;
  order.set_stop_recording(true);
  const auto summary = client_.ask(rank.rank, order, Deadline::after_ms(kOrderMs));
  if (!summary.ok()) return summary.status();
  rank.begin_ns = summary->begin_ns();
  rank.end_ns = summary->end_ns();
  rank.n_dropped = summary->n_dropped();
  const std::uint64_t n_kept = summary->n_kept();
  while (rank.records.size() < n_kept) {
    const std::size_t left = n_kept - rank.records.size();
    const std::size_t count = std::min(left, kRecordsPerReply);
    control::FetchRecords& fetch = *order.mutable_fetch_records();
    fetch.set_first(rank.records.size());
    fetch.set_count(static_cast<std::uint32_t>(count));
    const auto reply = client_.ask(rank.rank, order, Deadline::after_ms(kOrderMs));
    if (!reply.ok()) return reply.status();
    auto records = decode_records(*reply, count);
    if (!records.ok()) return records.status();
    if (records->empty()) return internal_error("a recording that is shorter than it was");
    rank.records.insert(rank.records.end(), records->begin(), records->end());
  }
  return ok_status();
}

Result<Trace> ClusterRecorder::record_all(const RecordingOptions& options,
                                          const std::stop_token& stop) {
  Trace trace = about_;
  for (RankTrace& rank : trace.ranks) {
    const auto reading = read_clock(rank.rank);
    if (!reading.ok()) return reading.status();
    rank.clock.begin = *reading;
  }
  const Status started = client_.ask_all(order_of(options), Deadline::after_ms(kOrderMs));
  if (!started.ok()) return started;
  if (!wait(options.duration + kLastSlices, stop)) {
    return cancelled("the recording was given up");
  }
  for (RankTrace& rank : trace.ranks) {
    const auto reading = read_clock(rank.rank);
    if (!reading.ok()) return reading.status();
    rank.clock.end = *reading;
  }
  for (RankTrace& rank : trace.ranks) {
    if (const Status status = collect(rank); !status.ok()) return status;
  }
  return trace;
}

}  // namespace spindle::worker
