#include "cluster/coordinator/waiting_queue.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::coordinator {

void WaitingQueue::push(WaitingTicket ticket) {
  ticket.arrival = work_done_;
  push_back(ticket);
}

void WaitingQueue::push_back(const WaitingTicket& ticket) {
  const auto owner = owners_.find(ticket.owner);
  CHECK(owner != owners_.end(), "the owner of a waiting request came");
  const bool is_new = tickets_.emplace(ticket.request, ticket).second;
  CHECK(is_new, "a request waits once");
  owner->second.waiting.insert(key(ticket));
}

WaitingTicket WaitingQueue::take(std::uint64_t request) {
  const auto found = tickets_.find(request);
  CHECK(found != tickets_.end(), "a request that is taken out waits");
  const WaitingTicket ticket = found->second;
  tickets_.erase(found);
  owners_.at(ticket.owner).waiting.erase(key(ticket));
  return ticket;
}

std::int64_t WaitingQueue::least_served() const {
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (const auto& [id, owner] : owners_) least = std::min(least, owner.served);
  return owners_.empty() ? 0 : least;
}

std::pair<std::int64_t, std::uint64_t> WaitingQueue::key(const WaitingTicket& ticket) {
  return {ticket.arrival + kPatience * ticket.work + ticket.priority * kPriorityTokens,
          ticket.request};
}

WaitingQueue::Walk::Walk(const WaitingQueue& queue) : queue_(queue) {
  const std::int64_t least = queue.least_served();
  for (const auto& [id, owner] : queue.owners_) {
    if (owner.waiting.empty()) continue;
    const std::int64_t handicap = owner.served - least;
    const auto& [part, request] = *owner.waiting.begin();
    heads_.push_back({part + handicap, request, id, handicap});
  }
  std::make_heap(heads_.begin(), heads_.end(), std::greater<>());
}

std::optional<std::uint64_t> WaitingQueue::Walk::next() {
  while (!heads_.empty()) {
    std::pop_heap(heads_.begin(), heads_.end(), std::greater<>());
    const Head head = heads_.back();
    heads_.pop_back();
    const auto owner = queue_.owners_.find(head.owner);
    if (owner == queue_.owners_.end()) continue;
    const auto& waiting = owner->second.waiting;
    const auto after = waiting.upper_bound({head.rank - head.handicap, head.request});
    if (after != waiting.end()) {
      heads_.push_back({after->first + head.handicap, after->second, head.owner, head.handicap});
      std::push_heap(heads_.begin(), heads_.end(), std::greater<>());
    }
    if (queue_.contains(head.request)) return head.request;
  }
  return std::nullopt;
}

std::vector<std::uint64_t> WaitingQueue::order() const {
  std::vector<std::uint64_t> requests;
  Walk walk(*this);
  while (const auto request = walk.next()) requests.push_back(*request);
  return requests;
}

bool WaitingQueue::is_due(std::uint64_t request) const {
  const WaitingTicket& ticket = tickets_.at(request);
  return key(ticket).first + owners_.at(ticket.owner).served - least_served() <= work_done_;
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
