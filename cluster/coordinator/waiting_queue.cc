#include "cluster/coordinator/waiting_queue.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::coordinator {

void WaitingQueue::push(WaitingTicket ticket) {
  ticket.arrival = work_done_;
  push_back(ticket);
}

void WaitingQueue::push_back(const WaitingTicket& ticket) {
  CHECK(owners_.contains(ticket.owner), "the owner of a waiting request came");
  const bool is_new = tickets_.emplace(ticket.request, ticket).second;
  CHECK(is_new, "a request waits once");
}

WaitingTicket WaitingQueue::take(std::uint64_t request) {
  const auto found = tickets_.find(request);
  CHECK(found != tickets_.end(), "a request that is taken out waits");
  const WaitingTicket ticket = found->second;
  tickets_.erase(found);
  return ticket;
}

std::int64_t WaitingQueue::least_served() const {
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (const auto& [id, owner] : owners_) least = std::min(least, owner.served);
  return owners_.empty() ? 0 : least;
}

std::int64_t WaitingQueue::rank(const WaitingTicket& ticket, std::int64_t least) const {
  return ticket.arrival + kPatience * ticket.work + ticket.priority * kPriorityTokens +
         owners_.at(ticket.owner).served - least;
}

std::vector<std::uint64_t> WaitingQueue::order() const {
  const std::int64_t least = least_served();
  std::vector<std::pair<std::int64_t, std::uint64_t>> ranked;
  ranked.reserve(tickets_.size());
  for (const auto& [request, ticket] : tickets_) ranked.emplace_back(rank(ticket, least), request);
  std::sort(ranked.begin(), ranked.end());
  std::vector<std::uint64_t> requests;
  requests.reserve(ranked.size());
  for (const auto& [value, request] : ranked) requests.push_back(request);
  return requests;
}

bool WaitingQueue::is_due(std::uint64_t request) const {
  return rank(tickets_.at(request), least_served()) <= work_done_;
}

void WaitingQueue::owner_came(std::uint64_t owner) {
  const std::int64_t least = least_served();
  const auto [found, is_new] = owners_.try_emplace(owner);
  if (is_new) found->second.served = least;
  ++found->second.n_requests;
}

void WaitingQueue::owner_left(std::uint64_t owner) {
  const auto found = owners_.find(owner);
  CHECK(found != owners_.end(), "an owner comes before leaving");
  if (--found->second.n_requests == 0) owners_.erase(found);
}

void WaitingQueue::served(std::uint64_t owner, std::int64_t tokens) {
  work_done_ += tokens;
  const auto found = owners_.find(owner);
  if (found != owners_.end()) found->second.served += tokens;
}

}  // namespace spindle::coordinator
