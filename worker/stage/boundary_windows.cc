#include "worker/stage/boundary_windows.h"

#include <algorithm>

#include "kernels/core/check.h"
#include "kvstore/head_move.h"

namespace spindle::worker {

PositionRange BoundaryWindows::wanted(std::int64_t first_position, std::int64_t n_tokens) const {
  if (next_ >= boundaries_.size() || !needs_.boundary.window_scores) return {};
  const std::int64_t boundary = boundaries_[next_];
  const std::int64_t before = next_ == 0 ? 0 : boundaries_[next_ - 1];
  const std::int64_t begin = std::max(boundary - kvstore::kObservationWindow, before);
  const PositionRange range{std::max(begin, first_position),
                            std::min(boundary, first_position + n_tokens)};
  return range.empty() ? PositionRange{} : range;
}

std::int64_t BoundaryWindows::n_queries() const {
  return has_queries() ? boundaries_[next_] - first_query_ : 0;
}

PositionRange BoundaryWindows::window() const {
  CHECK(next_ < boundaries_.size(), "a boundary that was announced");
  const std::int64_t boundary = boundaries_[next_];
  if (has_queries()) return {first_query_, boundary};
  return {std::max<std::int64_t>(boundary - kvstore::kObservationWindow, 0), boundary};
}

std::int64_t BoundaryWindows::max_boosted() const {
  const auto n_tokens = static_cast<double>(window().end);
  const auto most = static_cast<std::int64_t>(needs_.boost_share * n_tokens);
  return std::max<std::int64_t>(most - kvstore::kObservationWindow, 0);
}

void BoundaryWindows::pass() {
  first_query_ = -1;
  ++next_;
}

PositionRange head_candidates(std::int64_t tail_first, int sinks, std::int64_t window_begin) {
  return {std::min(tail_first == 0 ? std::int64_t{sinks} : tail_first, window_begin), window_begin};
}

std::int64_t n_selectable(const kvstore::HeadCache& cache, int recent, std::int64_t n_tokens,
                          std::int64_t first_candidate, std::int64_t n_scores) {
  const std::int64_t tail =
      kvstore::tail_begin(cache.tail_origin, cache.tail_first, recent, n_tokens);
  return std::clamp<std::int64_t>(tail - first_candidate, 0, n_scores);
}

}  // namespace spindle::worker
