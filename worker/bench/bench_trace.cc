#include "worker/bench/bench_trace.h"

#include <fstream>
#include <stop_token>
#include <utility>

#include "kernels/core/check.h"
#include "worker/bench/bench_rank.h"
#include "worker/trace/recording.h"

namespace spindle::worker {

OrderHandler recorder_orders(StepRecorder& recorder) {
  return [&recorder](const control::Order& order) {
    control::OrderReply reply;
    if (!carry_out(order, recorder, reply)) reply.set_error("an order that it does not know");
    return reply;
  };
}

void turn_recording(OrderClient& client, bool on) {
  control::Order order;
  if (on) {
    order.mutable_start_recording()->set_max_records(65536);
    order.mutable_start_recording()->set_duration_ms(600'000);
  } else {
    order.set_drop_recording(true);
  }
  const Status status = client.ask_all(order, Deadline::after_ms(10000));
  CHECK(status.ok(), status.to_string());
}

Status write_trace(OrderClient& client, const std::vector<control::StageInfo>& stages,
                   std::chrono::milliseconds duration, const std::string& path) {
  Trace about;
  about.model = "benchmark";
  about.micro_batches = bench_micro_batches(stages);
  for (const control::StageInfo& stage : stages) {
    RankTrace& rank = about.ranks.emplace_back();
    rank.rank = static_cast<int>(stage.stage());
    rank.device = stage.device();
    rank.first_layer = static_cast<int>(stage.first_layer());
    rank.n_layers = static_cast<int>(stage.n_layers());
  }
  ClusterRecorder recorder(client, std::move(about));
  RecordingOptions options;
  options.duration = duration;
  auto trace = recorder.record(options, std::stop_token());
  if (!trace.ok()) return trace.status();
  std::ofstream file(path);
  file << trace_json(std::move(*trace));
  file.flush();
  return file ? ok_status() : internal_error("cannot write " + path);
}

}  // namespace spindle::worker
