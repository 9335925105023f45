#include "cluster/api/state_feed.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

namespace spindle::api {
namespace {

using std::chrono::milliseconds;

TEST(StateFeed, MakesOnePictureForAllWithinAnInterval) {
  int n_rendered = 0;
  StateFeed feed([&] { return std::to_string(++n_rendered); }, milliseconds(1000), 2);
  const auto start = StateFeed::Clock::now();
  const StateFeed::Picture first = feed.latest(start);
  EXPECT_EQ(*first.event, "event: state\ndata: 1\n\n");
  EXPECT_EQ(first.next, start + milliseconds(1000));
  // A stream that joins later is given the same picture, and follows the same clock.
  const StateFeed::Picture second = feed.latest(start + milliseconds(999));
  EXPECT_EQ(second.event, first.event);
  EXPECT_EQ(second.next, first.next);
  const StateFeed::Picture third = feed.latest(start + milliseconds(1000));
  EXPECT_EQ(*third.event, "event: state\ndata: 2\n\n");
  // The reader of the first still has it.
  EXPECT_EQ(*first.event, "event: state\ndata: 1\n\n");
  // After a time without streams the picture is a new one at once.
  EXPECT_EQ(*feed.latest(start + milliseconds(60000)).event, "event: state\ndata: 3\n\n");
}

TEST(StateFeed, BoundsTheStreams) {
  StateFeed feed([] { return std::string("{}"); }, milliseconds(1000), 2);
  std::optional<StateFeed::Place> a = feed.join();
  std::optional<StateFeed::Place> b = feed.join();
  ASSERT_TRUE(a && b);
  EXPECT_FALSE(feed.join());
  EXPECT_EQ(feed.n_streams(), 2u);
  a.reset();
  EXPECT_TRUE(feed.join());  // and free again at once
  EXPECT_EQ(feed.n_streams(), 1u);
  StateFeed none([] { return std::string(); }, milliseconds(1), 0);
  EXPECT_FALSE(none.join());
}

TEST(StateFeed, SharesPicturesBetweenThreads) {
  std::atomic<int> n_rendered{0};
  StateFeed feed([&] { return std::to_string(++n_rendered); }, milliseconds(3600 * 1000), 8);
  std::vector<std::thread> threads;
  std::atomic<int> n_same{0};
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      const auto place = feed.join();
      if (*feed.latest(StateFeed::Clock::now()).event == "event: state\ndata: 1\n\n") ++n_same;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(n_same, 8);
  EXPECT_EQ(n_rendered, 1);
  EXPECT_EQ(feed.n_streams(), 0u);
}

}  // namespace
}  // namespace spindle::api
