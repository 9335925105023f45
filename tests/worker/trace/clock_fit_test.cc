#include "worker/trace/clock_fit.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace spindle::worker {
namespace {

TEST(ClockFit, TheFastestRoundTripCounts) {
  const std::vector<ClockSample> samples{
      {.sent_ns = 0, .answered_ns = 900, .received_ns = 1000},
      {.sent_ns = 2000, .answered_ns = 2550, .received_ns = 2100},
      {.sent_ns = 3000, .answered_ns = 1, .received_ns = 2999}};
  const auto reading = best_reading(samples);
  ASSERT_TRUE(reading.has_value());
  EXPECT_EQ(reading->offset_ns, 500);  // 2550 - 2050
  EXPECT_EQ(reading->error_ns, 50);
  EXPECT_FALSE(best_reading({}).has_value());
}

TEST(ClockFit, TheBoundHoldsHoweverUnequalTheWaysAre) {
  const auto seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto up_to = [&random](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  for (int round = 0; round < 200; ++round) {
    const std::int64_t offset = up_to(2'000'000'000) - 1'000'000'000;
    const double drift = static_cast<double>(up_to(200) - 100) * 1e-6;
    const auto rank_clock = [&](std::int64_t t) {
      return t + offset + static_cast<std::int64_t>(drift * static_cast<double>(t));
    };
    const auto read = [&](std::int64_t t) {
      std::vector<ClockSample> samples;
      for (int i = 0; i < 10; ++i) {
        const std::int64_t there = up_to(500'000);
        const std::int64_t back = up_to(5'000);
        samples.push_back({t, rank_clock(t + there), t + there + back});
        t += there + back;
      }
      return *best_reading(samples);
    };
    const ClockFit fit{read(1'000'000), read(5'000'000'000)};
    // The clocks' speeds differ by 100 ppm, the readings are about a reading's own length apart.
    const std::int64_t slack = 1000;
    std::int64_t last = 0;
    for (int i = 1; i < 50; ++i) {
      const std::int64_t t = 6'000'000 + i * 99'000'000LL;
      const std::int64_t mapped = fit.to_rank0(rank_clock(t));
      EXPECT_LE(std::abs(mapped - t), fit.error_ns() + slack);
      EXPECT_GT(mapped, last);
      last = mapped;
    }
  }
}

TEST(ClockFit, OutsideOfBothReadingsTheNearerOneCounts) {
  const ClockFit fit{{.rank_ns = 1000, .offset_ns = 10, .error_ns = 3},
                     {.rank_ns = 2000, .offset_ns = 30, .error_ns = 5}};
  EXPECT_EQ(fit.to_rank0(500), 490);
  EXPECT_EQ(fit.to_rank0(1500), 1480);
  EXPECT_EQ(fit.to_rank0(3000), 2970);
  EXPECT_EQ(fit.error_ns(), 5);
}

}  // namespace
}  // namespace spindle::worker
