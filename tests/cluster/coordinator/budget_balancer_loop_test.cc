// The balancer in a loop with a cluster: what it decides changes what it is told.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/cluster/coordinator/balancer_fixture.h"

namespace spindle::coordinator {
namespace {

using testing::Bench;
using testing::config_of;
using testing::kTypical;

// A cluster in a loop with the balancer: requests come, are admitted while they fit beside what is
// committed, compress to what their stage's level makes of them, and go.
struct Cluster {
  Cluster(Bench& on, double spread, std::uint64_t seed) : bench(on), random(seed) {
    std::uniform_real_distribution<double> off(1 - spread, 1 + spread);
    for (const kvstore::LevelCurve& curve : config.curves) {
      truth.emplace_back();
      for (const kvstore::LevelPoint& point : curve) {
        truth.back().push_back(static_cast<double>(point.bytes) * off(random));
      }
    }
  }

  BalancerConfig config = config_of(3);
  Bench& bench;
  std::mt19937_64 random;
  std::vector<std::vector<double>> truth;  // [n_stages][n_levels]
  struct Request {
    int left = 0;
    std::vector<std::uint64_t> bytes = {};
  };
  std::vector<Request> running;
  int waiting = 0;

  void tick(double arrivals, int lifetime) {
    waiting += std::poisson_distribution<int>(arrivals)(random);
    std::erase_if(running, [](Request& request) { return --request.left <= 0; });
    std::exponential_distribution<double> life(1.0 / lifetime);
    while (waiting > 0 && fits()) {
      Request request{.left = 1 + static_cast<int>(life(random))};
      for (std::size_t s = 0; s < truth.size(); ++s) {
        const auto level = static_cast<std::size_t>(bench.balancer.levels()[s]);
        request.bytes.push_back(static_cast<std::uint64_t>(truth[s][level]));
        bench.reports[s].planned_bytes += config.curves[s][level].bytes;
        bench.reports[s].kept_bytes += request.bytes.back();
      }
      running.push_back(std::move(request));
      --waiting;
    }
    waiting = std::min(waiting, 400);  // the queue's limit
    for (std::size_t s = 0; s < truth.size(); ++s) {
      bench.ledger[s].committed_bytes = held(s);
      bench.reports[s].used_bytes = held(s);
    }
    bench.tick(static_cast<int>(running.size()) + waiting);
  }
  std::uint64_t held(std::size_t s) const {
    std::uint64_t bytes = 0;
    for (const Request& request : running) bytes += request.bytes[s];
    return bytes;
  }
  bool fits() const {
    for (std::size_t s = 0; s < truth.size(); ++s) {
      if (held(s) + kTypical > bench.ledger[s].capacity_bytes) return false;
    }
    return true;
  }
};

TEST(BudgetBalancer, NeverOscillatesUnderConstantLoad) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  int most = 0;
  for (int round = 0; round < 10; ++round) {
    const auto demand = static_cast<int>(20 + random() % 300);
    SCOPED_TRACE("demand " + std::to_string(demand));
    Bench bench(config_of(3), {30000, 9000 + random() % 3000, 30000 - random() % 10000});
    // What is kept differs from the plan, by level, and is measured as one goes.
    std::vector<std::vector<double>> off(3);
    std::uniform_real_distribution<double> uniform(0.7, 1.4);
    for (auto& stage : off) {
      for (int l = 0; l < 6; ++l) stage.push_back(uniform(random));
    }
    std::vector<int> last;
    for (int i = 0; i < 10'000; ++i) {
      for (std::size_t s = 0; s < 3; ++s) {
        bench.reports[s].planned_bytes += 1'000'000;
        bench.reports[s].kept_bytes += static_cast<std::uint64_t>(
            1e6 * off[s][static_cast<std::size_t>(bench.balancer.levels()[s])]);
      }
      bench.tick(demand);
      if (i == 300) last = bench.balancer.levels();
    }
    EXPECT_EQ(bench.balancer.levels(), last);
    EXPECT_LE(bench.n_moves, 12);
    most = std::max(most, bench.n_moves);
  }
  RecordProperty("most_moves", std::to_string(most));
}

TEST(BudgetBalancer, SettlesUnderNoisyLoad) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  int most = 0;
  for (const double arrivals : {2.0, 5.0, 9.0, 14.0}) {
    SCOPED_TRACE("arrivals " + std::to_string(arrivals));
    Bench bench(config_of(3), {30000, 10000, 30000});
    Cluster cluster(bench, 0.2, seed);
    for (int i = 0; i < 10'000; ++i) cluster.tick(arrivals, 20);
    EXPECT_LE(bench.n_moves, 60);
    most = std::max(most, bench.n_moves);
  }
  RecordProperty("most_moves", std::to_string(most));
}

// The tight stage's memory is what limits the cluster; with the balancer more run together, and its
// stages fill up alike.
TEST(BudgetBalancer, MoreRunTogetherInALoop) {
  const auto mean_running = [](bool balanced) {
    BalancerConfig config = config_of(3);
    if (!balanced) config.warmup_us = std::int64_t{1} << 60;
    Bench bench(config, {30000, 10000, 30000});
    Cluster cluster(bench, 0.0, 7);
    double sum = 0;
    for (int i = 0; i < 2000; ++i) {
      cluster.tick(20, 20);
      if (i >= 1000) sum += static_cast<double>(cluster.running.size());
    }
    return sum / 1000;
  };
  const double plain = mean_running(false);
  const double balanced = mean_running(true);
  RecordProperty("running_plain", std::to_string(plain));
  RecordProperty("running_balanced", std::to_string(balanced));
  EXPECT_NEAR(plain, 90, 5);
  EXPECT_GT(balanced, 2.5 * plain);
}

TEST(BudgetBalancer, IsDeterministic) {
  Bench a(config_of(3), {30000, 10000, 20000});
  Bench b(config_of(3), {30000, 10000, 20000});
  Cluster cluster_a(a, 0.2, 11);
  Cluster cluster_b(b, 0.2, 11);
  for (int i = 0; i < 1000; ++i) {
    cluster_a.tick(10, 20);
    cluster_b.tick(10, 20);
    ASSERT_EQ(a.balancer.levels(), b.balancer.levels());
  }
  EXPECT_GT(a.n_moves, 0);
}

}  // namespace
}  // namespace spindle::coordinator
