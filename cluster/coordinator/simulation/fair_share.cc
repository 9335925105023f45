#include "cluster/coordinator/simulation/fair_share.h"

#include <algorithm>
#include <limits>
#include <string>

#include "cluster/coordinator/waiting_queue.h"

namespace spindle::coordinator::simulation {

void FairShare::arrive(std::uint64_t request, const engine::EngineRequest& asked, std::int64_t work,
                       std::int64_t now_us) {
  Request& entry = requests_[request];
  entry.owner = asked.owner;
  entry.patience = WaitingQueue::kPatience * static_cast<std::int64_t>(asked.prompt_ids.size()) +
                   WaitingQueue::kPriorityTokens * (asked.priority - first_priority_);
  entry.left = work;
  entry.ahead = left_;
  entry.arrived_us = now_us;
  left_ += work;
  arrivals_.push_back({now_us, asked.owner, work});
  entry.n_arrivals = arrivals_.size();
}

void FairShare::progress(std::uint64_t request, std::int64_t n) {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return;
  const std::int64_t done = std::min(n, found->second.left);
  found->second.left -= done;
  left_ -= done;
}

void FairShare::end(std::uint64_t request) {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return;
  left_ -= found->second.left;
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
  const Request& entry = found->second;
  std::int64_t work = entry.ahead;
  for (std::size_t i = entry.n_arrivals; i < arrivals_.size(); ++i) {
    const Arrival& later = arrivals_[i];
    if (later.time_us > until_us) break;
    const bool is_due = served(entry.arrived_us, later.time_us) >= entry.patience;
    if (later.owner != entry.owner || !is_due) work += later.work;
  }
  return work;
}

Status FairShare::check(std::uint64_t request, std::int64_t first_us) const {
  const auto found = requests_.find(request);
  if (found == requests_.end()) return ok_status();
  const std::int64_t run = served(found->second.arrived_us, first_us);
  const std::int64_t share = ahead(request, first_us);
  if (run <= 3 * share + slack_) return ok_status();
  return internal_error("request " + std::to_string(request) + " waited while " +
                        std::to_string(run) + " tokens ran, of which " + std::to_string(share) +
                        " were ahead of it");
}

}  // namespace spindle::coordinator::simulation
