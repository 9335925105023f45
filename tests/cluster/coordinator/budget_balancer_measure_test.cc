// What stages really kept of what the curves said, and what the balancer makes of it.

#include <gtest/gtest.h>

#include "tests/cluster/coordinator/balancer_fixture.h"

namespace spindle::coordinator {
namespace {

using testing::Bench;
using testing::config_of;

// A factor is a mean over some prompts: one that keeps eight times what the curve says, beside 16
// that keep just that, makes it 1 + 7 / 17 = 1.41, with which 158 requests still fit; 30,000 bytes
// would do for 1.85.
TEST(BudgetBalancer, OneOddPromptSaysLittle) {
  Bench bench(config_of(2), {100000, 30000});
  const auto compress = [&](std::uint64_t n_prompts, std::uint64_t kept) {
    for (BudgetReport& report : bench.reports) {
      report.planned_bytes += 100 * n_prompts;
      report.kept_bytes += 100 * n_prompts * kept;
    }
  };
  for (int i = 0; i < 60; ++i) {
    compress(4, 1);
    bench.tick(158);
  }
  compress(1, 8);
  EXPECT_EQ(bench.run(60, 158), 0);
  EXPECT_NEAR(bench.balancer.planned_bytes()[1], 1000 + 157 * 141.18, 1);
  // Many of them say it.
  for (int i = 0; i < 60; ++i) {
    compress(4, 8);
    bench.tick(158);
  }
  EXPECT_GT(bench.n_moves, 0);
  EXPECT_GT(bench.balancer.levels()[1], 0);
}

TEST(BudgetBalancer, RealBytesCorrectThePlannedOnes) {
  Bench bench(config_of(2), {30000, 30000});
  // Stage 1 keeps twice what was planned.
  for (int i = 0; i < 60; ++i) {
    for (std::size_t s = 0; s < 2; ++s) {
      bench.reports[s].planned_bytes += 1000;
      bench.reports[s].kept_bytes += s == 1 ? 2000 : 1000;
    }
    bench.tick(200);
  }
  // 29,000 / 199 = 145.7 bytes, of which it plans half: level 2 is 56.
  EXPECT_EQ(bench.balancer.levels(), (std::vector<int>{0, 2}));
  // What happened in warm-up is ignored.
  Bench warm(config_of(2), {30000, 30000});
  for (int i = 0; i < 60; ++i) {
    if (i < 5) {
      warm.reports[1].planned_bytes += 1000;
      warm.reports[1].kept_bytes += 3000;
    }
    warm.tick(200);
  }
  EXPECT_EQ(warm.balancer.levels(), (std::vector<int>{0, 0}));
}

// Of prompts far shorter than the curves' typical one, stages keep many times what the curves say.
TEST(BudgetBalancer, ManyTimesThePlannedBytesAreBelieved) {
  Bench bench(config_of(2), {30000, 30000});
  for (int i = 0; i < 60; ++i) {
    for (BudgetReport& report : bench.reports) {
      report.planned_bytes += 1000;
      report.kept_bytes += 10000;
    }
    bench.tick(200);
  }
  EXPECT_EQ(bench.balancer.levels(), (std::vector<int>{5, 5}));
  // 230 bytes each at the strongest level, beside a prefill.
  EXPECT_NEAR(bench.balancer.wanted_requests(), 1 + 29000 / 230.0, 1);
}

// What one level keeps of its plan says little about another that was measured too.
TEST(BudgetBalancer, MeasuredLevelsAreNotProjectedFromOthers) {
  Bench bench(config_of(2), {30000, 10000});
  for (int i = 0; i < 1000; ++i) {
    const double kept = bench.balancer.levels()[1] >= 2 ? 0.7 : 1.4;
    bench.reports[1].planned_bytes += 1000;
    bench.reports[1].kept_bytes += static_cast<std::uint64_t>(1000 * kept);
    bench.tick(100);
  }
  // 100 requests may take 90.9 bytes: levels 0 and 1 take 140 and 105, level 2 39.4. From that,
  // level 1 looks like 52.5, until it is tried.
  EXPECT_EQ(bench.balancer.levels()[1], 2);
  EXPECT_EQ(bench.n_moves, 3);
}

}  // namespace
}  // namespace spindle::coordinator
