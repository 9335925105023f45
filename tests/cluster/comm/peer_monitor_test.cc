#include "cluster/comm/peer_monitor.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cluster/comm/local_group.h"
#include "tests/cluster/comm/fault_group.h"

namespace spindle::comm {
namespace {

using std::chrono::milliseconds;
using testing::FaultHostGroup;

constexpr PeerMonitorOptions kFast{.beat_interval = milliseconds(20),
                                   .peer_timeout = milliseconds(400),
                                   .first_beat_timeout = milliseconds(1000)};

// What one rank's monitor reported. Thread-safety: any thread.
class Losses {
 public:
  PeerMonitor::OnPeerLost callback() {
    return [this](int rank, const std::string& message) {
      const std::lock_guard lock(mutex_);
      losses_.emplace_back(rank, message);
    };
  }
  std::vector<std::pair<int, std::string>> all() const {
    const std::lock_guard lock(mutex_);
    return losses_;
  }
  bool wait_for(std::size_t n, milliseconds wait) const {
    const Deadline deadline = Deadline::after(wait);
    while (all().size() < n) {
      if (deadline.passed()) return false;
      std::this_thread::sleep_for(milliseconds(5));
    }
    return true;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::pair<int, std::string>> losses_;
};

struct Cluster {
  explicit Cluster(int size, PeerMonitorOptions options = kFast) : local(size), losses(size) {
    for (int rank = 0; rank < size; ++rank) {
      groups.push_back(
          std::make_unique<FaultHostGroup>(local.host(rank), std::vector<testing::Fault>()));
      monitors.push_back(std::make_unique<PeerMonitor>(
          *groups.back(), options, losses[static_cast<std::size_t>(rank)].callback()));
    }
  }
  void start() {
    for (auto& monitor : monitors) monitor->start();
  }
  // Until rank 0 has heard everybody.
  bool wait_until_heard() {
    const Deadline deadline = Deadline::after_ms(5000);
    for (;;) {
      bool all = true;
      for (const PeerReport& report : monitors[0]->peers()) all = all && report.heard;
      for (std::size_t r = 1; r < monitors.size(); ++r) all = all && monitors[r]->peers()[0].heard;
      if (all) return true;
      if (deadline.passed()) return false;
      std::this_thread::sleep_for(milliseconds(5));
    }
  }

  LocalCluster local;
  std::vector<Losses> losses;
  std::vector<std::unique_ptr<FaultHostGroup>> groups;
  std::vector<std::unique_ptr<PeerMonitor>> monitors;
};

TEST(PeerMonitor, CarriesStepAndState) {
  Cluster c(3);
  c.monitors[2]->report(41, RankState::kServing);
  c.start();
  ASSERT_TRUE(c.wait_until_heard());
  c.monitors[2]->report(42, RankState::kDraining);
  const Deadline deadline = Deadline::after_ms(5000);
  PeerReport report;
  do {
    report = c.monitors[0]->peers()[1];
  } while (report.step != 42 && !deadline.passed());
  EXPECT_EQ(report.rank, 2);
  EXPECT_EQ(report.step, 42u);
  EXPECT_EQ(rank_state_name(report.state), "draining");
  EXPECT_EQ(c.monitors[1]->peers().size(), 1u);
  EXPECT_EQ(c.monitors[1]->peers()[0].rank, 0);
}

TEST(PeerMonitor, ReportsASilentRankOnceAndOnlyToRankZero) {
  Cluster c(3);
  c.start();
  ASSERT_TRUE(c.wait_until_heard());
  const auto start = std::chrono::steady_clock::now();
  c.groups[1]->kill();
  ASSERT_TRUE(c.losses[0].wait_for(1, milliseconds(5000)));
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(350));
  std::this_thread::sleep_for(milliseconds(500));
  const auto losses = c.losses[0].all();
  ASSERT_EQ(losses.size(), 1u);
  EXPECT_EQ(losses[0].first, 1);
  EXPECT_EQ(losses[0].second.find("rank 1 is lost: no heartbeat for "), 0u) << losses[0].second;
  EXPECT_TRUE(c.losses[2].all().empty());
  // The dead rank hears nothing either and draws its own conclusion.
  EXPECT_EQ(c.losses[1].all().size(), 1u);
}

TEST(PeerMonitor, EverybodyNoticesTheLossOfRankZero) {
  Cluster c(3);
  c.start();
  ASSERT_TRUE(c.wait_until_heard());
  c.groups[0]->kill();
  EXPECT_TRUE(c.losses[1].wait_for(1, milliseconds(5000)));
  EXPECT_TRUE(c.losses[2].wait_for(1, milliseconds(5000)));
}

TEST(PeerMonitor, ARankThatNeverStartsIsLostAfterTheLongerTimeout) {
  Cluster c(2);
  const auto start = std::chrono::steady_clock::now();
  c.monitors[0]->start();
  ASSERT_TRUE(c.losses[0].wait_for(1, milliseconds(5000)));
  EXPECT_GE(std::chrono::steady_clock::now() - start, kFast.first_beat_timeout);
  EXPECT_NE(c.losses[0].all()[0].second.find("since the monitor started"), std::string::npos);
}

TEST(PeerMonitor, AnOrderlyStopIsNoLoss) {
  Cluster c(3);
  c.start();
  ASSERT_TRUE(c.wait_until_heard());
  c.monitors[0]->stop();
  c.monitors[1]->stop();
  std::this_thread::sleep_for(milliseconds(700));
  c.monitors[2]->stop();
  for (const Losses& losses : c.losses) EXPECT_TRUE(losses.all().empty());
}

TEST(PeerMonitor, LeavesQuietlyWhenItsGroupIsShutDown) {
  Cluster c(2);
  c.start();
  ASSERT_TRUE(c.wait_until_heard());
  c.local.host(0).abort(70, "enough");
  std::this_thread::sleep_for(milliseconds(700));
  for (const Losses& losses : c.losses) EXPECT_TRUE(losses.all().empty());
}

TEST(PeerMonitor, ADamagedBeatIsReported) {
  Cluster c(2);
  c.monitors[0]->start();
  EXPECT_TRUE(
      c.local.host(1).send_frame(0, Channel::kHeartbeat, "noise", Deadline::after_ms(1000)).ok());
  ASSERT_TRUE(c.losses[0].wait_for(1, milliseconds(2000)));
  EXPECT_EQ(c.losses[0].all()[0].first, PeerMonitor::kNoRank);
}

TEST(PeerMonitor, StopIsPrompt) {
  Cluster c(2);
  c.start();
  const auto start = std::chrono::steady_clock::now();
  for (auto& monitor : c.monitors) monitor->stop();
  EXPECT_LT(std::chrono::steady_clock::now() - start, milliseconds(500));
}

// A child starts a grandchild that watches it, and ends.
TEST(PeerMonitor, ReportsTheEndOfItsParent) {
  int report[2];
  ASSERT_EQ(::pipe(report), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (::fork() == 0) {
      LocalCluster alone(1);
      PeerMonitor monitor(alone.host(0), {.watch_parent = true},
                          [&](int, const std::string& message) {
                            const ssize_t n = ::write(report[1], message.data(), message.size());
                            ::_exit(n > 0 ? 0 : 1);
                          });
      monitor.start();
      std::this_thread::sleep_for(std::chrono::seconds(20));
      ::_exit(1);
    }
    std::this_thread::sleep_for(milliseconds(300));
    ::_exit(0);
  }
  ::close(report[1]);
  EXPECT_EQ(::waitpid(child, nullptr, 0), child);
  pollfd ready{.fd = report[0], .events = POLLIN, .revents = 0};
  ASSERT_EQ(::poll(&ready, 1, 5000), 1);
  char text[200] = {};
  EXPECT_GT(::read(report[0], text, sizeof text - 1), 0);
  EXPECT_EQ(std::string(text),
            "the launcher (parent process " + std::to_string(child) + ") is gone");
  ::close(report[0]);
}

}  // namespace
}  // namespace spindle::comm
