#include "worker/trace/recording.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cluster/comm/local_group.h"

namespace spindle::worker {
namespace {

using std::chrono::milliseconds;

constexpr int kRanks = 3;

// Three ranks with recorders, and a thread on each that records a slice after another.
class Recording : public testing::Test {
 protected:
  Recording() {
    for (int rank = 0; rank < kRanks; ++rank) {
      StepRecorder& recorder = recorders_[static_cast<std::size_t>(rank)];
      const OrderHandler handler = [&recorder](const control::Order& order) {
        control::OrderReply reply;
        if (!carry_out(order, recorder, reply)) reply.set_error("unknown");
        return reply;
      };
      if (rank == 0) {
        client_ = std::make_unique<OrderClient>(cluster_.host(0), handler);
      } else {
        servers_.push_back(std::make_unique<OrderServer>(cluster_.host(rank), handler));
      }
      about_.ranks.emplace_back().rank = rank;
      stages_.emplace_back([this, &recorder] { work(recorder); });
    }
  }
  ~Recording() override {
    stopping_ = true;
    for (std::thread& stage : stages_) stage.join();
  }

  void work(StepRecorder& recorder) {
    std::uint64_t step = 0;
    std::int64_t begin = trace_clock_ns();
    while (!stopping_) {
      std::this_thread::sleep_for(milliseconds(1));
      const std::int64_t end = trace_clock_ns();
      if (recorder.is_on()) {
        recorder.add({.kind = TraceKind::kForward,
                      .step = ++step,
                      .begin_ns = begin,
                      .duration_ns = end - begin});
      }
      begin = end;
    }
  }

  comm::LocalCluster cluster_{kRanks};
  std::array<StepRecorder, kRanks> recorders_;
  std::unique_ptr<OrderClient> client_;
  std::vector<std::unique_ptr<OrderServer>> servers_;
  Trace about_;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> stages_;
};

TEST_F(Recording, CollectsEveryRankAndLeavesNothing) {
  ClusterRecorder recorder(*client_, about_);
  const auto trace = recorder.record({.duration = milliseconds(100)}, {});
  ASSERT_TRUE(trace.ok()) << trace.status().to_string();
  ASSERT_EQ(trace->ranks.size(), static_cast<std::size_t>(kRanks));
  for (const RankTrace& rank : trace->ranks) {
    EXPECT_GT(rank.records.size(), 2U);
    EXPECT_EQ(rank.n_dropped, 0U);
    EXPECT_NEAR(static_cast<double>(rank.end_ns - rank.begin_ns), 100e6, 1e6);
    // One clock for all: what the round trips say must be within what they say of themselves.
    EXPECT_LE(std::abs(rank.clock.begin.offset_ns), rank.clock.begin.error_ns);
    EXPECT_LE(std::abs(rank.clock.end.offset_ns), rank.clock.end.error_ns);
    EXPECT_EQ(rank.clock.error_ns() == 0, rank.rank == 0);
    std::int64_t covered = 0;
    for (const TraceRecord& record : rank.records) covered += record.duration_ns;
    EXPECT_NEAR(static_cast<double>(covered), 100e6, 30e6);
  }
  for (const StepRecorder& one : recorders_) EXPECT_TRUE(one.records(0, 10).empty());
}

TEST_F(Recording, AFullRingIsReported) {
  ClusterRecorder recorder(*client_, about_);
  const auto trace = recorder.record({.duration = milliseconds(100), .max_records = 4}, {});
  ASSERT_TRUE(trace.ok()) << trace.status().to_string();
  for (const RankTrace& rank : trace->ranks) {
    EXPECT_EQ(rank.records.size(), 4U);
    EXPECT_GT(rank.n_dropped, 0U);
  }
}

TEST_F(Recording, OneAtATimeAndAStopEndsIt) {
  ClusterRecorder recorder(*client_, about_);
  std::stop_source stop;
  Status first;
  std::thread other([&] {
    first = recorder.record({.duration = std::chrono::minutes(1)}, stop.get_token()).status();
  });
  while (!recorders_[0].is_on()) std::this_thread::yield();
  EXPECT_EQ(recorder.record({.duration = milliseconds(1)}, {}).status().code(),
            StatusCode::kResourceExhausted);
  EXPECT_TRUE(recorders_[0].is_on());  // the second one did not end the first
  stop.request_stop();
  other.join();
  EXPECT_EQ(first.code(), StatusCode::kCancelled);
  for (const StepRecorder& one : recorders_) EXPECT_FALSE(one.is_on());
  EXPECT_TRUE(recorder.record({.duration = milliseconds(1)}, {}).ok());
}

TEST_F(Recording, OtherOrdersAreNotItsOwn) {
  control::Order order;
  order.set_log_level("debug");
  control::OrderReply reply;
  EXPECT_FALSE(carry_out(order, recorders_[0], reply));
}

}  // namespace
}  // namespace spindle::worker
