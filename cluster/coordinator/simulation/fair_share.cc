#include "cluster/coordinator/simulation/fair_share.h"

#include <algorithm>
#include <limits>
#include <string>

namespace spindle::coordinator::simulation {

void FairShare::arrive(std::uint64_t request, int priority, std::int64_t work,
                       std::int64_t now_us) {
  Request& entry = requests_[request];
  entry.priority = priority;
  entry.left = work;
  entry.arrived_us = now_us;
  for (auto it = left_.lower_bound(priority); it != left_.end(); ++it) entry.ahead += it->second;
  left_[priority] += work;
  arrivals_.push_back({now_us, priority, work});
  entry.n_arrivals = arrivals_.size();
}

void FairShare::progress(std::uint64_t request, std::int64_t n) {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return;
  const std::int64_t done = std::min(n, found->second.left);
  found->second.left -= done;
  left_[found->second.priority] -= done;
}

void FairShare::end(std::uint64_t request) {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return;
  left_[found->second.priority] -= found->second.left;
  requests_.erase(found);
}

void FairShare::serve(std::int64_t n, std::int64_t now_us) {
  served_.emplace_back(now_us, n + (served_.empty() ? 0 : served_.back().second));
}

std::int64_t FairShare::served(std::int64_t from_us, std::int64_t to_us) const {
  const auto until = [this](std::int64_t time_us) {
    const auto after =
        std::upper_bound(served_.begin(), served_.end(),
                         std::pair(time_us, std::numeric_limits<std::int64_t>::max()));
    return after == served_.begin() ? std::int64_t{0} : std::prev(after)->second;
  };
  return until(to_us) - until(from_us);
}

std::int64_t FairShare::ahead(std::uint64_t request, std::int64_t until_us) const {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return 0;
  std::int64_t work = found->second.ahead;
  for (std::size_t i = found->second.n_arrivals; i < arrivals_.size(); ++i) {
    if (arrivals_[i].time_us > until_us) break;
    if (arrivals_[i].priority > found->second.priority) work += arrivals_[i].work;
  }
  return work;
}

Status FairShare::check(std::uint64_t request, std::int64_t first_us) const {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return ok_status();
  const std::int64_t run = served(found->second.arrived_us, first_us);
  const std::int64_t share = ahead(request, first_us);
  if (run <= 3 * share + slack_) return ok_status();
  return internal_error("request " + std::to_string(request) + " of priority " +
                        std::to_string(found->second.priority) + " waited while " +
                        std::to_string(run) + " tokens ran, of which " + std::to_string(share) +
                        " were ahead of it");
}

}  // namespace spindle::coordinator::simulation
