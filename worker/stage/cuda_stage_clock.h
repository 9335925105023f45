#pragma once
// StageClock of a compute stream: every mark is an event on it.

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/core/cuda_context.h"
#include "worker/stage/stage_clock.h"

struct CUevent_st;

namespace spindle::worker {

// Does not own the context, which must outlive it. Neither call waits for the device: an interval
// is counted once its second event has happened, and when more marks are open than there are
// events, the oldest interval is lost.
// Thread-safety: none; the stage's thread.
class CudaStageClock final : public StageClock {
 public:
  explicit CudaStageClock(const CudaContext& context) : context_(context) {}
  ~CudaStageClock() override;

  void mark(StageTime what, std::uint64_t exclude_us = 0) override;
  StageTimes take() override;

 private:
  // Eight marks a step, and some steps that the thread is ahead of the device.
  static constexpr std::size_t kEvents = 128;
  struct Mark {
    CUevent_st* event = nullptr;  // made at its first use
    StageTime what = StageTime::kOther;
    double exclude_us = 0;
  };

  void resolve();

  const CudaContext& context_;
  std::array<Mark, kEvents> marks_ = {};
  std::uint64_t n_marks_ = 0;     // marked; mark i is marks_[i % kEvents]
  std::uint64_t n_resolved_ = 0;  // marks whose time is known or lost
  std::array<double, kStageTimes> us_ = {};
};

}  // namespace spindle::worker
