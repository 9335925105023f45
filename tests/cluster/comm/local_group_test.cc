#include "cluster/comm/local_group.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "tests/cluster/comm/group_checks.h"

namespace spindle::comm {
namespace {

using testing::CheckLog;
using testing::run_ranks;

constexpr std::uint64_t kSeed = 20240611;

class LocalGroupTest : public ::testing::TestWithParam<int> {};

TEST_P(LocalGroupTest, KeepsTheContractOfTheGroups) {
  LocalCluster cluster(GetParam());
  CheckLog log;
  run_ranks(GetParam(), [&](int rank) {
    testing::check_groups(cluster.host(rank), cluster.device(rank), kSeed, log);
    testing::check_size_mismatch(cluster.host(rank), cluster.device(rank), log);
  });
  // Apart, because in one process the end of one rank's device group is the end of all.
  run_ranks(GetParam(), [&](int rank) {
    testing::check_shutdown(cluster.host(rank), cluster.device(rank), log);
  });
  EXPECT_EQ(log.text(), "") << "seed " << kSeed;
}

TEST_P(LocalGroupTest, RunsAPipelineOnThreeThreadsPerRank) {
  LocalCluster cluster(GetParam());
  CheckLog log;
  run_ranks(GetParam(), [&](int rank) {
    testing::check_pipeline(cluster.host(rank), cluster.device(rank), kSeed, 60, log);
  });
  EXPECT_EQ(log.text(), "") << "seed " << kSeed;
}

TEST_P(LocalGroupTest, AbortWakesEveryWaiterOfEveryRank) {
  LocalCluster cluster(GetParam());
  CheckLog log;
  const Deadline far = Deadline::after_ms(20'000);
  std::vector<std::thread> waiters;
  for (int rank = 0; rank < cluster.size(); ++rank) {
    waiters.emplace_back([&, rank] {
      log.expect_code(cluster.host(rank).recv(0, Channel::kPlan, far).status(),
                      StatusCode::kUnavailable);
    });
    waiters.emplace_back([&, rank] {
      const Status s = cluster.host(rank).recv(kAnySource, Channel::kResult, far).status();
      log.expect_code(s, StatusCode::kUnavailable);
      log.expect(s.message().find("disk on fire") != std::string::npos, s.message());
    });
    if (cluster.size() == 1) continue;
    waiters.emplace_back([&, rank] {
      std::byte out[4];
      log.expect_code(cluster.device(rank).recv((rank + 1) % cluster.size(), out, far),
                      StatusCode::kUnavailable);
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const auto start = std::chrono::steady_clock::now();
  cluster.host(cluster.size() - 1).abort(70, "disk on fire");
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
  for (int rank = 0; rank < cluster.size(); ++rank) {
    EXPECT_EQ(cluster.host(rank).send(0, Channel::kPlan, "late", far).code(),
              StatusCode::kUnavailable);
    EXPECT_EQ(cluster.host(rank).barrier(far).ok(), cluster.size() == 1);
  }
  EXPECT_EQ(log.text(), "");
}

INSTANTIATE_TEST_SUITE_P(Ranks, LocalGroupTest, ::testing::Values(1, 2, 4),
                         [](const auto& ranks) { return std::to_string(ranks.param); });

TEST(LocalGroupLimits, AFullQueueMakesSendWaitUntilItsDeadline) {
  LocalCluster cluster(2, {.max_unreceived_bytes = 1000});
  HostGroup& sender = cluster.host(0);
  const std::string bytes(600, 'x');
  EXPECT_TRUE(sender.send(1, Channel::kPlan, bytes, Deadline::after_ms(50)).ok());
  EXPECT_EQ(sender.send(1, Channel::kPlan, bytes, Deadline::after_ms(50)).code(),
            StatusCode::kDeadlineExceeded);
  // Another channel has its own room, and an empty queue takes even a message over the limit.
  EXPECT_TRUE(
      sender.send(1, Channel::kResult, std::string(5000, 'y'), Deadline::after_ms(50)).ok());
  EXPECT_TRUE(cluster.host(1).recv(0, Channel::kPlan, Deadline::after_ms(50)).ok());
  EXPECT_TRUE(sender.send(1, Channel::kPlan, bytes, Deadline::after_ms(50)).ok());
}

TEST(LocalGroupLimits, OneRanksShutdownLeavesTheOthersWorking) {
  LocalCluster cluster(3);
  const Deadline deadline = Deadline::after_ms(5000);
  cluster.host(1).shutdown("leaving");
  EXPECT_TRUE(cluster.host(0).send(1, Channel::kPlan, "lost", deadline).ok());
  EXPECT_TRUE(cluster.host(0).send(2, Channel::kPlan, "plan", deadline).ok());
  EXPECT_EQ(cluster.host(2).recv(0, Channel::kPlan, deadline)->bytes, "plan");
  EXPECT_EQ(cluster.host(1).recv(0, Channel::kPlan, deadline).status().code(),
            StatusCode::kUnavailable);
}

}  // namespace
}  // namespace spindle::comm
