#include "cluster/coordinator/waiting_queue.h"

#include <gtest/gtest.h>

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
