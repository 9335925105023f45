#include "cluster/coordinator/level_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

namespace spindle::coordinator {
namespace {

TEST(LevelChoice, RequestsThatFit) {
  const StageLoad stage{.bytes = {10, 5}, .error = {0, 1}, .capacity = 100, .peak = 40};
  EXPECT_EQ(requests_that_fit(stage, 0), 7);  // 40 and six times 10
  EXPECT_EQ(requests_that_fit(stage, 1), 13);
  // A prefill that takes less than what is kept does not show.
  EXPECT_EQ(requests_that_fit({.bytes = {10}, .error = {0}, .capacity = 95, .peak = 3}, 0), 9.5);
  EXPECT_EQ(requests_that_fit({.bytes = {10}, .error = {0}, .capacity = 20, .peak = 40}, 0), 0.5);
  // Two and a half in their prefill take 50: four times 10 fit beside them.
  const StageLoad three{.bytes = {10}, .error = {0}, .capacity = 90, .peak = 50, .n_at_peak = 2.5};
  EXPECT_EQ(requests_that_fit(three, 0), 6.5);
  EXPECT_EQ(bytes_of_requests(three, 0, 6.5), 90);
  EXPECT_EQ(bytes_of_requests(three, 0, 1), 50);
  EXPECT_EQ(requests_that_fit(
                {.bytes = {10}, .error = {0}, .capacity = 25, .peak = 50, .n_at_peak = 2.5}, 0),
            1.25);
}

TEST(LevelChoice, PricesByHand) {
  // From 100 to 60 bytes for 1: 0.025 a byte; then 0.1; then 1.
  const StageLoad stage{
      .bytes = {100, 60, 40, 30}, .error = {0, 1, 3, 13}, .capacity = 1000, .peak = 0};
  const auto choose = [&](int lightest, double n) { return choose_level(stage, lightest, n); };
  EXPECT_EQ(choose(0, 10).level, 0);
  EXPECT_EQ(choose(0, 10).price, 0);
  EXPECT_EQ(choose(0, 10.1).level, 1);
  EXPECT_DOUBLE_EQ(choose(0, 10.1).price, 0.025);
  EXPECT_EQ(choose(0, 20).level, 2);
  EXPECT_DOUBLE_EQ(choose(0, 20).price, 0.1);
  EXPECT_EQ(choose(0, 33).level, 3);
  EXPECT_DOUBLE_EQ(choose(0, 33).price, 1.0);
  EXPECT_TRUE(choose(0, 33).fits);
  EXPECT_EQ(choose(0, 34).level, 3);
  EXPECT_FALSE(choose(0, 34).fits);
  EXPECT_EQ(choose(2, 3).level, 2);
  EXPECT_EQ(choose(2, 30).level, 3);
}

// The price passes over a level off the hull; the constraint does not.
TEST(LevelChoice, LevelsOffTheHullAreFound) {
  const StageLoad stage{.bytes = {100, 80, 50}, .error = {0, 5, 6}, .capacity = 1000, .peak = 0};
  EXPECT_EQ(choose_level(stage, 0, 12).level, 1);
  EXPECT_EQ(choose_level(stage, 0, 13).level, 2);
  // Of levels with the same error the lightest, although others take less.
  const StageLoad flat{.bytes = {100, 80, 50}, .error = {2, 2, 2}, .capacity = 1000, .peak = 0};
  EXPECT_EQ(choose_level(flat, 0, 3).level, 0);
  EXPECT_EQ(choose_level(flat, 0, 12).level, 1);
  EXPECT_EQ(choose_level(flat, 0, 12).price, 0);
}

TEST(LevelChoice, IsTheLeastErrorThatFits) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int round = 0; round < 5000; ++round) {
    StageLoad stage;
    const auto n_levels = 1 + random() % 9;
    double bytes = 1e6 * (1 + uniform(random));
    double error = uniform(random);
    for (std::size_t l = 0; l < n_levels; ++l) {
      stage.bytes.push_back(bytes);
      stage.error.push_back(error);
      if (random() % 5 != 0) bytes *= 0.3 + 0.7 * uniform(random);
      if (random() % 5 != 0) error += uniform(random);
    }
    stage.capacity = 1e7 * uniform(random);
    stage.peak = 1e7 * uniform(random) * uniform(random);
    const auto lightest = static_cast<int>(random() % n_levels);
    const double n = 30 * uniform(random);
    const LevelChoice choice = choose_level(stage, lightest, n);
    int best = -1;
    for (int l = lightest; l < static_cast<int>(n_levels) && best < 0; ++l) {
      if (requests_that_fit(stage, l) >= n) best = l;
    }
    ASSERT_EQ(choice.fits, best >= 0);
    ASSERT_GE(choice.level, lightest);
    const auto chosen = static_cast<std::size_t>(choice.level);
    if (best >= 0) {
      ASSERT_EQ(choice.level, best);
    } else {
      ASSERT_EQ(std::llround(stage.bytes[chosen]), std::llround(stage.bytes.back()));
    }
    // At its price no stronger level is better: it would have been chosen before.
    ASSERT_GE(choice.price, 0);
    if (best == lightest) {
      ASSERT_EQ(choice.price, 0);
    }
  }
}

}  // namespace
}  // namespace spindle::coordinator
