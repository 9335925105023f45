#include "worker/stage/cuda_stage_clock.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "kernels/core/cuda_check.h"

namespace spindle::worker {

CudaStageClock::~CudaStageClock() {
  for (const Mark& mark : marks_) {
    if (mark.event != nullptr) static_cast<void>(cudaEventDestroy(mark.event));
  }
}

void CudaStageClock::mark(StageTime what, std::uint64_t exclude_us) {
  // An event of which an open interval still needs the time is not recorded anew.
  if (n_marks_ - n_resolved_ + 1 >= kEvents) resolve();
  if (n_marks_ - n_resolved_ + 1 >= kEvents) ++n_resolved_;
  Mark& mark = marks_[n_marks_ % kEvents];
  if (mark.event == nullptr) cuda_check(cudaEventCreate(&mark.event), "cudaEventCreate");
  cuda_check(cudaEventRecord(mark.event, context_.stream()), "cudaEventRecord");
  mark.what = what;
  mark.exclude_us = static_cast<double>(exclude_us);
  ++n_marks_;
}

void CudaStageClock::resolve() {
  for (; n_resolved_ < n_marks_; ++n_resolved_) {
    const Mark& mark = marks_[n_resolved_ % kEvents];
    if (!event_reached(mark.event)) return;
    if (n_resolved_ == 0) continue;  // nothing before it
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, marks_[(n_resolved_ - 1) % kEvents].event, mark.event),
               "cudaEventElapsedTime");
    us_[static_cast<std::size_t>(mark.what)] += std::max(1000.0 * ms - mark.exclude_us, 0.0);
  }
}

StageTimes CudaStageClock::take() {
  resolve();
  StageTimes times;
  for (std::size_t i = 0; i < kStageTimes; ++i) {
    const double whole = std::floor(us_[i]);
    times.us[i] = static_cast<std::uint64_t>(whole);
    us_[i] -= whole;
  }
  return times;
}

}  // namespace spindle::worker
