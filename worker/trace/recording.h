#pragma once
// A recording of the whole cluster: rank 0 compares the clocks, starts and stops the recorders of
// all ranks by orders (worker/orders) and collects what they kept.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stop_token>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "proto/control.pb.h"
#include "worker/orders/order_channel.h"
#include "worker/trace/step_recorder.h"
#include "worker/trace/trace_json.h"

namespace spindle::worker {

// A rank's side: carries the order out if it is about the recording or the clock. False: it is not.
bool carry_out(const control::Order& order, StepRecorder& recorder, control::OrderReply& reply);

struct RecordingOptions {
  std::chrono::milliseconds duration{5000};
  std::size_t max_records = 65536;  // of each rank
};

// Rank 0's side. Does not own the client. Thread-safety: record() from any thread.
class ClusterRecorder {
 public:
  // `about` is what every trace says of the cluster and of its ranks, without records.
  ClusterRecorder(OrderClient& client, Trace about) : client_(client), about_(std::move(about)) {}

  // Waits for the duration; `stop` ends it with CANCELLED. RESOURCE_EXHAUSTED while another one is
  // under way, DEADLINE_EXCEEDED when a rank does not answer. Nothing is left on the ranks.
  Result<Trace> record(const RecordingOptions& options, const std::stop_token& stop);

 private:
  Result<Trace> record_all(const RecordingOptions& options, const std::stop_token& stop);
  Result<ClockReading> read_clock(int rank);
  Status collect(RankTrace& rank);

  OrderClient& client_;
  const Trace about_;
  std::atomic<bool> under_way_{false};
};

}  // namespace spindle::worker
