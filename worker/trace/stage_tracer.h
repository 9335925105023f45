#pragma once
// The slices of one stage thread: each begins where the one before it ended.

#include <cstdint>

#include "worker/trace/step_recorder.h"

namespace spindle::worker {

// Without a recorder, or while it is off, a slice costs a branch and no look at the clock.
// Thread-safety: none; the stage's thread.
class StageTracer {
 public:
  // Does not own the recorder, which outlives it; it may be null.
  explicit StageTracer(StepRecorder* recorder) : recorder_(recorder) {}

  bool is_on() const { return recorder_ != nullptr && recorder_->is_on(); }

  // What the thread did since the last slice, until now.
  void slice(TraceKind kind, std::uint64_t step, std::int64_t a = 0, std::int64_t b = 0,
             std::int64_t c = 0) {
    if (is_on()) [[unlikely]]
      add(kind, step, a, b, c);
  }
  // The same, but its last transfer_ns go into `transfer`: the waiting before it is a slice apart.
  void wait_and_transfer(TraceKind wait, TraceKind transfer, std::uint64_t step,
                         std::int64_t transfer_ns, std::int64_t bytes);
  // The other way round, for what is sent: when in the call it went is not known, and shown later
  // than it was, it would begin after the other side had it.
  void transfer_and_wait(TraceKind transfer, TraceKind wait, std::uint64_t step,
                         std::int64_t transfer_ns, std::int64_t bytes);
  // A value from now on.
  void value(TraceKind kind, std::uint64_t step, std::int64_t a);

 private:
  void add(TraceKind kind, std::uint64_t step, std::int64_t a, std::int64_t b, std::int64_t c);

  StepRecorder* recorder_;
  // Of an earlier recording, or never, it lies before the present one, which cuts it.
  std::int64_t last_ns_ = 0;
};

}  // namespace spindle::worker
