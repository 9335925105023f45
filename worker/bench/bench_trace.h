#pragma once
// Recordings of a benchmark's ranks.

#include <chrono>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "proto/control.pb.h"
#include "worker/orders/order_channel.h"
#include "worker/trace/step_recorder.h"

namespace spindle::worker {

// What a rank does with orders about its recorder, which outlives the handler.
OrderHandler recorder_orders(StepRecorder& recorder);

// Rank 0: the recorders of all ranks.
void turn_recording(OrderClient& client, bool on);

// Rank 0: records all ranks for that long and writes a Chrome trace (worker/trace/trace_json.h).
Status write_trace(OrderClient& client, const std::vector<control::StageInfo>& stages,
                   std::chrono::milliseconds duration, const std::string& path);

}  // namespace spindle::worker
