#include "cluster/comm/backoff.h"

#include <gtest/gtest.h>

#include <chrono>

namespace spindle::comm {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr BackoffPolicy kPolicy{
    .spin = microseconds(50), .min_sleep = microseconds(20), .max_sleep = microseconds(500)};

TEST(Backoff, YieldsFirstThenSleepsLongerTheLongerItWaits) {
  EXPECT_EQ(sleep_after(kPolicy, microseconds(0), false), microseconds(0));
  EXPECT_EQ(sleep_after(kPolicy, microseconds(49), false), microseconds(0));
  EXPECT_EQ(sleep_after(kPolicy, microseconds(50), false), microseconds(20));
  EXPECT_EQ(sleep_after(kPolicy, microseconds(6400), false), microseconds(100));
  EXPECT_EQ(sleep_after(kPolicy, milliseconds(32), false), microseconds(500));
  EXPECT_EQ(sleep_after(kPolicy, std::chrono::hours(1), false), microseconds(500));
}

TEST(Backoff, SleepsAreAShareOfTheWait) {
  BackoffPolicy sparing = kPolicy;
  sparing.wait_share = kSparingShare;
  EXPECT_EQ(sleep_after(sparing, microseconds(50), false), microseconds(20));
  EXPECT_EQ(sleep_after(sparing, microseconds(3200), false), microseconds(200));
  EXPECT_EQ(sleep_after(sparing, milliseconds(8), false), microseconds(500));
}

TEST(Backoff, PendingSendsKeepItAwake) {
  EXPECT_EQ(sleep_after(kPolicy, milliseconds(6), true),
            sleep_after(kPolicy, milliseconds(6), false));
  EXPECT_EQ(sleep_after(kPolicy, std::chrono::hours(1), true), microseconds(200));
  const BackoffPolicy slow{
      .spin = microseconds(0), .min_sleep = microseconds(5000), .max_sleep = microseconds(5000)};
  EXPECT_EQ(sleep_after(slow, microseconds(0), false), microseconds(5000));
  EXPECT_EQ(sleep_after(slow, microseconds(0), true), microseconds(200));
}

TEST(Backoff, NeverSleepsBeyondTheDeadline) {
  Backoff backoff({.spin = microseconds(0),
                   .min_sleep = std::chrono::seconds(10),
                   .max_sleep = std::chrono::seconds(10)});
  const auto start = std::chrono::steady_clock::now();
  backoff.pause(Deadline::after(milliseconds(20)), false);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

}  // namespace
}  // namespace spindle::comm
