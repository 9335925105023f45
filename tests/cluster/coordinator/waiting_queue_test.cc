#include "cluster/coordinator/waiting_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>

namespace spindle::coordinator {
namespace {

using Order = std::vector<std::uint64_t>;

class WaitingQueueTest : public ::testing::Test {
 protected:
  void push(std::uint64_t request, std::int64_t work, std::int32_t priority = 0,
            std::uint64_t owner = 0) {
    queue_.owner_came(owner);
    queue_.push({.request = request, .owner = owner, .priority = priority, .work = work});
  }
  WaitingQueue queue_;
};

TEST_F(WaitingQueueTest, EqualRequestsAreServedAsTheyCame) {
  for (std::uint64_t i = 1; i <= 4; ++i) push(i, 100);
  EXPECT_EQ(queue_.order(), (Order{1, 2, 3, 4}));
  queue_.take(2);
  EXPECT_EQ(queue_.order(), (Order{1, 3, 4}));
}

TEST_F(WaitingQueueTest, AShortRequestOvertakesALongOneUntilThatIsDue) {
  push(1, 1000);
  queue_.served(0, 500);
  push(2, 10);
  EXPECT_EQ(queue_.order(), (Order{2, 1}));
  EXPECT_FALSE(queue_.is_due(1));
  queue_.served(0, 1500);
  EXPECT_TRUE(queue_.is_due(1));
  push(3, 10);
  EXPECT_EQ(queue_.order(), (Order{2, 1, 3}));
}

TEST_F(WaitingQueueTest, PrioritiesGoFirstAndGrowOld) {
  push(1, 10, 1);
  push(2, 10, 0);
  push(3, 10, -1);
  EXPECT_EQ(queue_.order(), (Order{3, 2, 1}));
  queue_.served(0, 2 * WaitingQueue::kPriorityTokens + 1);
  push(4, 10, -1);
  EXPECT_EQ(queue_.order(), (Order{3, 2, 1, 4}));
}

TEST_F(WaitingQueueTest, AnOwnerWhoWasServedMuchWaitsBehindOneWhoWasNot) {
  push(1, 10, 0, 1);
  push(2, 10, 0, 2);
  queue_.served(1, 5000);
  push(3, 10, 0, 1);
  push(4, 10, 0, 2);
  EXPECT_EQ(queue_.order(), (Order{2, 1, 4, 3}));
  // One who comes now starts level with the least served, whatever came before.
  push(5, 10, 0, 3);
  EXPECT_EQ(queue_.order(), (Order{2, 1, 4, 5, 3}));
}

TEST_F(WaitingQueueTest, AnOwnerWithoutRequestsIsForgotten) {
  push(1, 10, 0, 1);
  push(2, 10, 0, 2);
  queue_.served(1, 5000);
  queue_.take(1);
  queue_.owner_left(1);
  push(3, 10, 0, 1);
  push(4, 10, 0, 2);
  EXPECT_EQ(queue_.order(), (Order{2, 3, 4}));
}

TEST_F(WaitingQueueTest, OneThatRanWaitsWhereItWas) {
  push(1, 10);
  push(2, 10);
  const WaitingTicket first = queue_.take(1);
  queue_.served(0, 1000);
  push(3, 10);
  queue_.push_back(first);
  EXPECT_EQ(queue_.order(), (Order{1, 2, 3}));
}

TEST_F(WaitingQueueTest, AWalkGoesOnWhileTheQueueChanges) {
  push(1, 10, 0, 1);
  push(2, 20, 0, 1);
  push(3, 30, 0, 2);
  push(4, 40, 0, 1);
  push(5, 50, 0, 2);
  WaitingQueue::Walk walk(queue_);
  EXPECT_EQ(walk.next(), 1u);
  queue_.take(1);
  queue_.take(2);  // was its owner's next
  const WaitingTicket third = queue_.take(3);
  queue_.owner_left(1);
  EXPECT_EQ(walk.next(), 4u);
  queue_.push_back(third);  // before where the walk is with its owner
  EXPECT_EQ(walk.next(), 5u);
  EXPECT_EQ(walk.next(), std::nullopt);
  EXPECT_EQ(queue_.order(), (Order{3, 4, 5}));
}

// The walk is the order of all ranks, whatever owners there are.
TEST_F(WaitingQueueTest, WalksInTheOrderOfRanks) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  std::map<std::uint64_t, std::int64_t> served;
  std::vector<WaitingTicket> tickets;
  for (std::uint64_t i = 1; i <= 300; ++i) {
    const std::uint64_t owner = random() % 7;
    const auto work = 1 + static_cast<std::int64_t>(random() % 50);
    const auto priority = static_cast<std::int32_t>(random() % 3);
    push(i, work, priority, owner);
    tickets.push_back({.request = i, .owner = owner, .priority = priority, .work = work});
  }
  // All came before any work was done, so that arrivals are equal.
  for (std::uint64_t owner = 0; owner < 7; ++owner) {
    served[owner] = static_cast<std::int64_t>(random() % 400);
    queue_.served(owner, served[owner]);
  }
  const auto rank = [&](const WaitingTicket& t) {
    return std::pair(WaitingQueue::kPatience * t.work + t.priority * WaitingQueue::kPriorityTokens +
                         served[t.owner],
                     t.request);
  };
  std::ranges::sort(tickets, {}, rank);
  Order expected;
  for (const WaitingTicket& ticket : tickets) expected.push_back(ticket.request);
  EXPECT_EQ(queue_.order(), expected);
}

// Whatever comes, the work done before a request goes first is bounded.
TEST_F(WaitingQueueTest, NothingStarves) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  push(1, 8000, 1, 7);
  std::int64_t done = 0;
  std::uint64_t next = 2;
  while (queue_.order().front() != 1) {
    for (int i = 0; i < 3; ++i, ++next) {
      push(next, 1 + static_cast<std::int64_t>(random() % 200), 0, random() % 3);
    }
    const WaitingTicket ticket = queue_.take(queue_.order().front());
    queue_.served(ticket.owner, ticket.work);
    done += ticket.work;
    ASSERT_LE(done, 2 * (WaitingQueue::kPriorityTokens + WaitingQueue::kPatience * 8000));
  }
}

}  // namespace
}  // namespace spindle::coordinator
