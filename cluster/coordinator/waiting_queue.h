#pragma once
// The order in which waiting requests are tried, counted in tokens of work instead of time, so that
// it depends on what was asked and done alone.
//
// Each request has a rank, lower goes first:
//   work done when it arrived + kPatience * its own work + priority * kPriorityTokens
//   + how much more its owner was served than the least served owner there is.
// So a short request overtakes longer ones that came a little earlier; a request of another
// priority goes first unless the other has waited for kPriorityTokens of work; and an owner who
// asks for much waits behind one who asks for little (virtual token counters: Sheng et al.,
// Fairness in Serving Large Language Models, OSDI 2024). Nothing starves: work that is done goes
// up, ranks of those who wait do not. A request whose rank is no more than the work done is due;
// nobody overtakes it any more, fit or not.
//
// Thread-safety: none; owned by the scheduler.

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

namespace spindle::coordinator {

struct WaitingTicket {
  std::uint64_t request = 0;
  std::uint64_t owner = 0;
  std::int32_t priority = 0;  // lower goes first
  std::int64_t work = 0;      // tokens to prefill
  std::int64_t arrival = 0;   // work done then; push() fills it in
};

class WaitingQueue {
 public:
  static constexpr std::int64_t kPatience = 2;
  static constexpr std::int64_t kPriorityTokens = 1 << 17;

  void push(WaitingTicket ticket);
  // One that ran and has to wait again, where it was.
  void push_back(const WaitingTicket& ticket);
  // Takes it out; the ticket can be pushed back. It must be there.
  WaitingTicket take(std::uint64_t request);
  bool contains(std::uint64_t request) const { return tickets_.contains(request); }

  // Those that wait in the order in which they are to be tried, equal ranks by request, one at a
  // time: each costs the logarithm of the queue, and finding the first costs the number of owners.
  // Ranks are those of the walk's beginning. The queue may be changed meanwhile: one that is taken
  // out before its turn does not come, one that is put in may come. Must not outlive the queue.
  class Walk {
   public:
    explicit Walk(const WaitingQueue& queue);
    std::optional<std::uint64_t> next();

   private:
    struct Head {
      std::int64_t rank;
      std::uint64_t request;
      std::uint64_t owner;
      std::int64_t handicap;  // of all of the owner's
      auto operator<=>(const Head&) const = default;
    };
    const WaitingQueue& queue_;
    std::vector<Head> heads_;  // a heap, one of each owner
  };
  // The whole of it.
  std::vector<std::uint64_t> order() const;
  bool is_due(std::uint64_t request) const;

  // An owner's requests that wait or run; counted so that one who comes back after a pause starts
  // level with the others.
  void owner_came(std::uint64_t owner);
  void owner_left(std::uint64_t owner);
  // Tokens were run for an owner who came.
  void served(std::uint64_t owner, std::int64_t tokens);

  std::size_t size() const { return tickets_.size(); }
  bool empty() const { return tickets_.empty(); }

 private:
  struct Owner {
    int n_requests = 0;
    std::int64_t served = 0;
    std::set<std::pair<std::int64_t, std::uint64_t>> waiting;  // by the rank's own part
  };
  std::int64_t least_served() const;
  // Of a rank what does not change while the request waits, and the request.
  static std::pair<std::int64_t, std::uint64_t> key(const WaitingTicket& ticket);

  std::map<std::uint64_t, WaitingTicket> tickets_;
  std::map<std::uint64_t, Owner> owners_;
  std::int64_t work_done_ = 0;
};

}  // namespace spindle::coordinator
