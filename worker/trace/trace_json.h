#pragma once
// A recording of all ranks as a Chrome trace: what ui.perfetto.dev and chrome://tracing open. Pure.
//
// A rank is a process with the threads compute, transfer, compression and bubble, and on rank 0
// also scheduler. All come from one thread's records, so that their slices never overlap and fill
// the time together. Moments are instant events, values are counters. `otherData` says how far each
// rank's clock may be off and how many events were dropped.

#include <cstdint>
#include <string>
#include <vector>

#include "worker/trace/clock_fit.h"
#include "worker/trace/trace_record.h"

namespace spindle::worker {

struct RankTrace {
  int rank = 0;
  std::string device;
  int first_layer = 0;
  int n_layers = 0;
  ClockFit clock;
  std::int64_t begin_ns = 0;  // of the recording, by the rank's clock
  std::int64_t end_ns = 0;
  std::uint64_t n_dropped = 0;
  std::vector<TraceRecord> records;
};

struct Trace {
  std::string model;
  std::string server_version;
  int micro_batches = 1;         // in flight
  std::vector<RankTrace> ranks;  // rank 0 first
};

// The document in pieces of some tens of kilobytes, so that it is never in memory as a whole.
// Thread-safety: none.
class TraceWriter {
 public:
  explicit TraceWriter(Trace trace);
  // The next piece; false after the last.
  bool next(std::string& piece);

 private:
  // Adds the record's event, or nothing when a slice before it hides it.
  void append(const RankTrace& rank, const TraceRecord& record, std::string& out);
  void append_head(std::string& out) const;
  void append_tail(std::string& out) const;

  Trace trace_;
  std::int64_t zero_ns_ = 0;  // by rank 0's clock: the earliest begin
  std::size_t rank_ = 0;
  std::size_t record_ = 0;
  std::vector<std::int64_t> busy_until_;  // of the rank's threads
  bool head_written_ = false;
  bool tail_written_ = false;
};

// All pieces together.
std::string trace_json(Trace trace);

}  // namespace spindle::worker
