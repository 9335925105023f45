#include "kvstore/plan/knapsack.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>

namespace spindle::kvstore {
namespace {

using Items = std::vector<std::vector<KnapsackOption>>;

// Least error over all combinations within the limit.
double brute_force(const Items& items, std::uint64_t limit) {
  double best = std::numeric_limits<double>::infinity();
  const std::function<void(std::size_t, std::uint64_t, double)> visit =
      [&](std::size_t item, std::uint64_t bytes, double error) {
        if (bytes > limit) return;
        if (item == items.size()) {
          best = std::min(best, error);
          return;
        }
        for (const KnapsackOption& option : items[item]) {
          visit(item + 1, bytes + option.bytes, error + option.error);
        }
      };
  visit(0, 0, 0.0);
  return best;
}

KnapsackOption total(const Items& items, const std::vector<std::size_t>& chosen) {
  KnapsackOption sum;
  for (std::size_t i = 0; i < items.size(); ++i) {
    sum.bytes += items[i][chosen[i]].bytes;
    sum.error += items[i][chosen[i]].error;
  }
  return sum;
}

TEST(ConvexHull, LeavesOutWhatIsAboveIt) {
  const std::vector<KnapsackOption> options = {{30, 1.0}, {10, 9.0},  {20, 6.0}, {40, 0.5},
                                               {25, 7.0}, {10, 10.0}, {50, 0.5}};
  // (20, 6) lies above the line from (10, 9) to (30, 1).
  EXPECT_EQ(convex_hull(options), (std::vector<std::size_t>{1, 0, 3}));
}

TEST(ConvexHull, ErrorsThatAreNotNumbersAreTheWorst) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<KnapsackOption> options = {{10, nan}, {20, 5.0}, {30, nan}};
  EXPECT_EQ(convex_hull(options), (std::vector<std::size_t>{0, 1}));
}

TEST(ChooseOptions, ByHand) {
  const Items items = {{{10, 10.0}, {20, 4.0}, {40, 0.0}}, {{10, 5.0}, {30, 1.0}}};
  // Steps by error per byte: item 0 +10 (0.6), then +20 of either (0.2, the earlier first).
  EXPECT_EQ(choose_options(items, 0), (std::vector<std::size_t>{0, 0}));
  EXPECT_EQ(choose_options(items, 29), (std::vector<std::size_t>{0, 0}));
  EXPECT_EQ(choose_options(items, 30), (std::vector<std::size_t>{1, 0}));
  EXPECT_EQ(choose_options(items, 50), (std::vector<std::size_t>{2, 0}));
  EXPECT_EQ(choose_options(items, 70), (std::vector<std::size_t>{2, 1}));
}

TEST(ChooseOptions, AStepThatDoesNotFitLeavesRoomForASmallerOne) {
  const Items items = {{{10, 100.0}, {60, 0.0}}, {{10, 5.0}, {15, 1.0}}};
  EXPECT_EQ(choose_options(items, 30), (std::vector<std::size_t>{0, 1}));
}

TEST(ChooseOptions, AgainstBruteForce) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 200; ++round) {
    Items items(2 + random() % 3);
    double largest_step = 0;
    std::uint64_t most = 0;
    for (auto& options : items) {
      options.resize(2 + random() % 4);
      double worst = 0;
      double best = 1e9;
      std::uint64_t largest = 0;
      for (KnapsackOption& option : options) {
        option = {1 + random() % 50, static_cast<double>(random() % 1000)};
        worst = std::max(worst, option.error);
        best = std::min(best, option.error);
        largest = std::max(largest, option.bytes);
      }
      largest_step = std::max(largest_step, worst - best);
      most += largest;
    }
    for (std::uint64_t limit = 0; limit <= most + 1; ++limit) {
      const double optimum = brute_force(items, limit);
      const KnapsackOption greedy = total(items, choose_options(items, limit));
      if (optimum == std::numeric_limits<double>::infinity()) continue;  // nothing fits
      ASSERT_LE(greedy.bytes, limit);
      ASSERT_GE(greedy.error, optimum);
      // Off by less than one step of one item, and not at all for the bytes that it stops at,
      // unless it passed over a step.
      ASSERT_LE(greedy.error, optimum + largest_step);
    }
    // Without a limit it walks along the hulls; each stop is optimal for its bytes.
    const KnapsackOption all = total(items, choose_options(items, most));
    ASSERT_EQ(all.error, brute_force(items, most));
  }
}

TEST(ChooseOptions, EachStopOfOneHullAfterAnotherIsOptimal) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 100; ++round) {
    // Equal steps of 8 bytes: no step is ever passed over for its size.
    Items items(2 + random() % 3);
    for (auto& options : items) {
      double error = 10000;
      double drop = 3000;
      for (std::uint64_t bytes = 8; bytes <= 32; bytes += 8) {
        options.push_back({bytes, error});
        drop = std::floor(drop * static_cast<double>(random() % 100) / 100.0);
        error -= drop;
      }
    }
    for (std::uint64_t limit = 8 * items.size(); limit <= 32 * items.size(); limit += 8) {
      ASSERT_EQ(total(items, choose_options(items, limit)).error, brute_force(items, limit));
    }
  }
}

}  // namespace
}  // namespace spindle::kvstore
