#include "worker/trace/clock_fit.h"

#include <algorithm>
#include <cmath>

namespace spindle::worker {

std::optional<ClockReading> best_reading(std::span<const ClockSample> samples) {
  const ClockSample* best = nullptr;
  for (const ClockSample& sample : samples) {
    if (sample.received_ns < sample.sent_ns) continue;
    if (best == nullptr ||
        sample.received_ns - sample.sent_ns < best->received_ns - best->sent_ns) {
      best = &sample;
    }
  }
  if (best == nullptr) return std::nullopt;
  const std::int64_t round_trip = best->received_ns - best->sent_ns;
  return ClockReading{.rank_ns = best->answered_ns,
                      .offset_ns = best->answered_ns - (best->sent_ns + round_trip / 2),
                      .error_ns = (round_trip + 1) / 2};
}

std::int64_t ClockFit::to_rank0(std::int64_t rank_ns) const {
  const auto span = static_cast<double>(end.rank_ns - begin.rank_ns);
  double share = span > 0 ? static_cast<double>(rank_ns - begin.rank_ns) / span : 0;
  share = std::clamp(share, 0.0, 1.0);
  const auto drift = static_cast<double>(end.offset_ns - begin.offset_ns);
  return rank_ns - begin.offset_ns - std::llround(share * drift);
}

std::int64_t ClockFit::error_ns() const { return std::max(begin.error_ns, end.error_ns); }

}  // namespace spindle::worker
