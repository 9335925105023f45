#include "worker/trace/stage_tracer.h"

#include <algorithm>

namespace spindle::worker {

void StageTracer::add(TraceKind kind, std::uint64_t step, std::int64_t a, std::int64_t b,
                      std::int64_t c) {
  const std::int64_t now = trace_clock_ns();
  recorder_->add({.kind = kind,
                  .step = step,
                  .begin_ns = last_ns_,
                  .duration_ns = now - last_ns_,
                  .a = a,
                  .b = b,
                  .c = c});
  last_ns_ = now;
}

void StageTracer::wait_and_transfer(TraceKind wait, TraceKind transfer, std::uint64_t step,
                                    std::int64_t transfer_ns, std::int64_t bytes) {
  if (!is_on()) return;
  const std::int64_t now = trace_clock_ns();
  const std::int64_t waited = std::max<std::int64_t>(now - last_ns_ - transfer_ns, 0);
  recorder_->add({.kind = wait, .step = step, .begin_ns = last_ns_, .duration_ns = waited});
  last_ns_ += waited;
  recorder_->add({.kind = transfer,
                  .step = step,
                  .begin_ns = last_ns_,
                  .duration_ns = now - last_ns_,
                  .c = bytes});
  last_ns_ = now;
}

void StageTracer::transfer_and_wait(TraceKind transfer, TraceKind wait, std::uint64_t step,
                                    std::int64_t transfer_ns, std::int64_t bytes) {
  if (!is_on()) return;
  const std::int64_t now = trace_clock_ns();
  const std::int64_t moved = std::clamp<std::int64_t>(transfer_ns, 0, now - last_ns_);
  recorder_->add(
      {.kind = transfer, .step = step, .begin_ns = last_ns_, .duration_ns = moved, .c = bytes});
  last_ns_ += moved;
  recorder_->add({.kind = wait, .step = step, .begin_ns = last_ns_, .duration_ns = now - last_ns_});
  last_ns_ = now;
}

void StageTracer::value(TraceKind kind, std::uint64_t step, std::int64_t a) {
  if (!is_on()) return;
  recorder_->add({.kind = kind, .step = step, .begin_ns = trace_clock_ns(), .a = a});
}

}  // namespace spindle::worker
