#include "worker/trace/stage_tracer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <vector>

#include "worker/trace/plan_trace.h"

namespace spindle::worker {
namespace {

using std::chrono::hours;

TEST(StageTracer, WithoutARecorderNothingHappens) {
  StageTracer tracer(nullptr);
  EXPECT_FALSE(tracer.is_on());
  tracer.slice(TraceKind::kForward, 1);
  tracer.wait_and_transfer(TraceKind::kAwaitStage, TraceKind::kReceive, 1, 10, 20);
  tracer.value(TraceKind::kKvUsed, 1, 5);
}

TEST(StageTracer, SlicesFollowEachOtherWithoutAGap) {
  StepRecorder recorder;
  StageTracer tracer(&recorder);
  tracer.slice(TraceKind::kForward, 1);  // off
  ASSERT_TRUE(recorder.start(100, hours(1)).ok());
  tracer.slice(TraceKind::kIdle, 0);  // began before the recording, which cuts it
  tracer.wait_and_transfer(TraceKind::kAwaitStage, TraceKind::kReceive, 2, 1, 4096);
  tracer.slice(TraceKind::kForward, 2, 5, 6);
  tracer.value(TraceKind::kKvUsed, 2, 77);
  tracer.slice(TraceKind::kReport, 2);
  const RecordingSummary summary = recorder.stop();
  std::vector<TraceRecord> records = recorder.records(0, 100);
  ASSERT_EQ(records.size(), 6U);
  EXPECT_EQ(records[0].begin_ns, summary.begin_ns);
  std::int64_t end = summary.begin_ns;
  for (const TraceRecord& record : records) {
    if (record.kind == TraceKind::kKvUsed) {
      EXPECT_EQ(record.a, 77);
      continue;
    }
    EXPECT_EQ(record.begin_ns, end);
    EXPECT_GE(record.duration_ns, 0);
    end = record.begin_ns + record.duration_ns;
  }
  EXPECT_LE(end, summary.end_ns);
  EXPECT_EQ(records[1].kind, TraceKind::kAwaitStage);
  EXPECT_EQ(records[2].kind, TraceKind::kReceive);
  EXPECT_EQ(records[2].duration_ns, 1);
  EXPECT_EQ(records[2].c, 4096);
  EXPECT_EQ(records[3].a, 5);
  EXPECT_EQ(records[3].b, 6);
}

TEST(StageTracer, ATransferIsNoLongerThanItsSlice) {
  StepRecorder recorder;
  StageTracer tracer(&recorder);
  ASSERT_TRUE(recorder.start(100, hours(1)).ok());
  tracer.slice(TraceKind::kIdle, 0);
  tracer.wait_and_transfer(TraceKind::kAwaitStage, TraceKind::kReceive, 2, 1'000'000'000'000, 1);
  const auto records = recorder.records(0, 100);
  ASSERT_EQ(records.size(), 3U);
  EXPECT_EQ(records[1].duration_ns, 0);
  EXPECT_LT(records[2].duration_ns, 1'000'000'000'000);
}

TEST(StageTracer, WhatIsSentIsShownAtTheBeginningOfItsCall) {
  StepRecorder recorder;
  StageTracer tracer(&recorder);
  ASSERT_TRUE(recorder.start(100, hours(1)).ok());
  tracer.slice(TraceKind::kForward, 2);
  tracer.transfer_and_wait(TraceKind::kSend, TraceKind::kAwaitRoom, 2, 1, 4096);
  tracer.transfer_and_wait(TraceKind::kSend, TraceKind::kAwaitRoom, 3, 1'000'000'000'000, 1);
  const auto records = recorder.records(0, 100);
  ASSERT_EQ(records.size(), 5U);
  std::int64_t end = records[0].begin_ns + records[0].duration_ns;
  for (std::size_t i = 1; i < records.size(); ++i) {
    EXPECT_EQ(records[i].kind, i % 2 == 1 ? TraceKind::kSend : TraceKind::kAwaitRoom);
    EXPECT_EQ(records[i].begin_ns, end);
    end += records[i].duration_ns;
  }
  EXPECT_EQ(records[1].duration_ns, 1);
  EXPECT_EQ(records[1].c, 4096);
  EXPECT_LT(records[3].duration_ns, 1'000'000'000'000);
  EXPECT_EQ(records[4].duration_ns, 0);
}

TEST(PlanTrace, CountsPromptAndDecodedTokens) {
  control::StepPlan plan;
  plan.add_open();
  plan.add_free(7);
  control::Run& chunk = *plan.add_runs();
  for (int i = 0; i < 5; ++i) chunk.add_tokens(i);
  chunk.set_sample(true);
  control::Run& decode = *plan.add_runs();
  decode.add_tokens(1);
  decode.set_sample(true);
  plan.add_runs()->add_tokens(1);  // a chunk of one token
  EXPECT_EQ(count_tokens(plan).prefill, 6);
  EXPECT_EQ(count_tokens(plan).decode, 1);
  EXPECT_EQ(count_sequences(plan), 2);
}

}  // namespace
}  // namespace spindle::worker
