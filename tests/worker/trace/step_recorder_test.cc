#include "worker/trace/step_recorder.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace spindle::worker {
namespace {

using std::chrono::hours;
using std::chrono::milliseconds;

TraceRecord record_at(std::int64_t begin_ns, std::int64_t duration_ns, std::uint64_t step = 1) {
  return {
      .kind = TraceKind::kForward, .step = step, .begin_ns = begin_ns, .duration_ns = duration_ns};
}

std::vector<std::uint64_t> steps_of(const StepRecorder& recorder) {
  std::vector<std::uint64_t> steps;
  for (const TraceRecord& record : recorder.records(0, StepRecorder::kMaxRecords)) {
    steps.push_back(record.step);
  }
  return steps;
}

TEST(StepRecorder, OffItKeepsNothing) {
  StepRecorder recorder;
  EXPECT_FALSE(recorder.is_on());
  recorder.add(record_at(trace_clock_ns(), 10));
  EXPECT_EQ(recorder.stop().n_kept, 0U);
  EXPECT_TRUE(recorder.records(0, 10).empty());
}

TEST(StepRecorder, AFullRingDropsTheOldestAndCountsThem) {
  StepRecorder recorder;
  ASSERT_TRUE(recorder.start(4, hours(1)).ok());
  for (std::uint64_t step = 1; step <= 10; ++step)
    recorder.add(record_at(trace_clock_ns(), 1, step));
  const RecordingSummary summary = recorder.stop();
  EXPECT_EQ(summary.n_kept, 4U);
  EXPECT_EQ(summary.n_dropped, 6U);
  EXPECT_EQ(steps_of(recorder), (std::vector<std::uint64_t>{7, 8, 9, 10}));
  EXPECT_EQ(recorder.records(3, 10).at(0).step, 10U);
  EXPECT_EQ(recorder.records(1, 2).size(), 2U);
  EXPECT_TRUE(recorder.records(4, 1).empty());
  recorder.drop();
  EXPECT_TRUE(recorder.records(0, 10).empty());
}

TEST(StepRecorder, SlicesAreCutAtTheEndsOfTheRecording) {
  StepRecorder recorder;
  const std::int64_t before = trace_clock_ns();
  ASSERT_TRUE(recorder.start(16, milliseconds(50)).ok());
  const std::int64_t after = trace_clock_ns();
  recorder.add(record_at(before - 1000, 500, 1));                // over before it began
  recorder.add(record_at(before - 1000, 1'000'000, 2));          // reaches into it
  recorder.add(record_at(after + 1'000'000, 1'000'000'000, 3));  // reaches over its end
  EXPECT_TRUE(recorder.is_on());
  recorder.add(record_at(after + 50'000'000, 10, 4));  // behind it
  EXPECT_FALSE(recorder.is_on());
  recorder.add(record_at(after, 10, 5));  // it is over
  const auto records = recorder.records(0, 16);
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[0].step, 2U);
  EXPECT_GE(records[0].begin_ns, before);
  EXPECT_EQ(records[0].begin_ns + records[0].duration_ns, before - 1000 + 1'000'000);
  EXPECT_EQ(records[1].step, 3U);
  EXPECT_LE(records[1].begin_ns + records[1].duration_ns, after + 50'000'000);
}

TEST(StepRecorder, OneAtATimeUntilItsEnd) {
  StepRecorder recorder;
  ASSERT_TRUE(recorder.start(4, hours(1)).ok());
  EXPECT_EQ(recorder.start(4, hours(1)).code(), StatusCode::kResourceExhausted);
  static_cast<void>(recorder.stop());
  ASSERT_TRUE(recorder.start(4, milliseconds(0)).ok());
  // Nothing came that would have turned it off, but its time is over.
  EXPECT_TRUE(recorder.start(4, hours(1)).ok());
  EXPECT_EQ(recorder.start(0, hours(1)).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(recorder.start(StepRecorder::kMaxRecords + 1, hours(1)).code(),
            StatusCode::kInvalidArgument);
}

TEST(StepRecorder, CountsWhatManyThreadsAdd) {
  StepRecorder recorder;
  ASSERT_TRUE(recorder.start(100, hours(1)).ok());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&recorder] {
      for (int i = 0; i < 1000; ++i) {
        if (recorder.is_on()) recorder.add(record_at(trace_clock_ns(), 1));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const RecordingSummary summary = recorder.stop();
  EXPECT_EQ(summary.n_kept + summary.n_dropped, 4000U);
  EXPECT_EQ(summary.n_kept, 100U);
}

}  // namespace
}  // namespace spindle::worker
