#include "worker/stage/stage_clock.h"

#include <gtest/gtest.h>

#include <chrono>
#include <numeric>

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

std::uint64_t total(const StageTimes& times) {
  return std::accumulate(times.us.begin(), times.us.end(), std::uint64_t{0});
}

void spin(std::chrono::microseconds time) {
  const Clock::time_point until = Clock::now() + time;
  while (Clock::now() < until) {
  }
}

TEST(HostStageClock, GivesEveryIntervalToItsCause) {
  HostStageClock clock;
  spin(std::chrono::milliseconds(2));
  const Clock::time_point began = Clock::now();
  clock.mark(StageTime::kBusy);  // only begins
  EXPECT_EQ(total(clock.take()), 0u);
  spin(std::chrono::milliseconds(3));
  clock.mark(StageTime::kBusy);
  spin(std::chrono::milliseconds(1));
  clock.mark(StageTime::kUpstream);
  spin(std::chrono::milliseconds(2));
  clock.mark(StageTime::kBusy);
  const auto passed = static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - began).count());
  const StageTimes times = clock.take();
  EXPECT_GE(times[StageTime::kBusy], 4999u);
  EXPECT_GE(times[StageTime::kUpstream], 999u);
  EXPECT_EQ(times[StageTime::kEmpty], 0u);
  EXPECT_LE(total(times), passed);
  EXPECT_EQ(total(clock.take()), 0u);
}

TEST(HostStageClock, LeavesOutWhatItIsTold) {
  HostStageClock clock;
  clock.mark(StageTime::kOther);
  spin(std::chrono::milliseconds(3));
  const Clock::time_point began = Clock::now();
  clock.mark(StageTime::kEmpty, 3'600'000'000);  // more than passed
  EXPECT_EQ(clock.take()[StageTime::kEmpty], 0u);
  spin(std::chrono::milliseconds(5));
  clock.mark(StageTime::kEmpty, 2000);
  const auto passed = static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - began).count());
  const std::uint64_t empty = clock.take()[StageTime::kEmpty];
  EXPECT_GE(empty, 2999u);
  EXPECT_LE(empty, passed - 2000 + 1);
}

// Intervals below a microsecond are not lost.
TEST(HostStageClock, KeepsFractions) {
  HostStageClock clock;
  clock.mark(StageTime::kOther);
  const Clock::time_point began = Clock::now();
  std::uint64_t us = 0;
  while (Clock::now() - began < std::chrono::milliseconds(5)) {
    clock.mark(StageTime::kBusy);
    us += clock.take()[StageTime::kBusy];
  }
  clock.mark(StageTime::kBusy);
  us += clock.take()[StageTime::kBusy];
  EXPECT_GE(us, 4900u);
}

}  // namespace
}  // namespace spindle::worker
