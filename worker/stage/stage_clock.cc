#include "worker/stage/stage_clock.h"

#include <algorithm>

namespace spindle::worker {

void HostStageClock::mark(StageTime what, std::uint64_t exclude_us) {
  const Clock::time_point now = Clock::now();
  if (last_ != Clock::time_point()) {
    const std::chrono::nanoseconds passed =
        now - last_ - std::chrono::microseconds(static_cast<std::int64_t>(exclude_us));
    ns_[static_cast<std::size_t>(what)] += std::max<std::int64_t>(passed.count(), 0);
  }
  last_ = now;
}

// What is less than a microsecond waits for the next report.
StageTimes HostStageClock::take() {
  StageTimes times;
  for (std::size_t i = 0; i < kStageTimes; ++i) {
    times.us[i] = static_cast<std::uint64_t>(ns_[i] / 1000);
    ns_[i] %= 1000;
  }
  return times;
}

}  // namespace spindle::worker
