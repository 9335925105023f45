#include "worker/trace/trace_json.h"

#include <gtest/gtest.h>

#include <boost/json.hpp>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace spindle::worker {
namespace {

namespace json = boost::json;

// A stage thread of `n_steps` steps without a gap, on a clock that is `offset_ns` ahead.
RankTrace busy_rank(int rank, int n_steps, std::int64_t offset_ns, std::mt19937_64& random) {
  RankTrace out;
  out.rank = rank;
  out.device = "cpu \"odd\" \\ name";
  out.first_layer = 4 * rank;
  out.n_layers = 4;
  out.clock.begin = {.rank_ns = offset_ns, .offset_ns = offset_ns, .error_ns = rank * 100};
  out.clock.end = {
      .rank_ns = offset_ns + 1'000'000'000, .offset_ns = offset_ns + 500, .error_ns = rank * 200};
  std::int64_t now = 1'000'000 + offset_ns;
  out.begin_ns = now;
  for (int step = 1; step <= n_steps; ++step) {
    for (const TraceKind kind :
         {TraceKind::kIdle, TraceKind::kPrepare, TraceKind::kCompress, TraceKind::kAwaitStage,
          TraceKind::kReceive, TraceKind::kForward, TraceKind::kSample, TraceKind::kSend,
          TraceKind::kScore, TraceKind::kReport}) {
      const auto duration = static_cast<std::int64_t>(random() % 100'000);
      out.records.push_back({.kind = kind,
                             .step = static_cast<std::uint64_t>(step),
                             .begin_ns = now,
                             .duration_ns = duration,
                             .a = 512,
                             .b = 3,
                             .c = 65536});
      now += duration;
    }
  }
  out.end_ns = now;
  return out;
}

Trace some_trace(int n_steps, std::mt19937_64& random) {
  Trace trace;
  trace.model = "mini";
  trace.server_version = "1.2.3";
  trace.micro_batches = 4;
  trace.ranks.push_back(busy_rank(0, n_steps, 0, random));
  trace.ranks.push_back(busy_rank(1, n_steps, 7'000'000'000, random));
  trace.ranks.push_back(busy_rank(2, n_steps, -3'000'000, random));
  return trace;
}

double end_of(const json::object& event) {
  return event.at("ts").to_number<double>() + event.at("dur").to_number<double>();
}

TEST(TraceJson, SlicesOfAThreadFollowEachOtherAndFillTheTime) {
  const auto seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const Trace trace = some_trace(50, random);
  const json::object document = json::parse(trace_json(trace)).as_object();
  std::map<std::pair<std::int64_t, std::int64_t>, double> last_end;
  std::map<std::int64_t, double> covered;
  std::size_t n_slices = 0;
  for (const json::value& value : document.at("traceEvents").as_array()) {
    const json::object& event = value.as_object();
    if (event.at("ph").as_string() != "X") continue;
    ++n_slices;
    const auto pid = event.at("pid").as_int64();
    double& last = last_end[{pid, event.at("tid").as_int64()}];
    EXPECT_GE(event.at("ts").to_number<double>(), last - 1e-6);
    EXPECT_GE(event.at("dur").to_number<double>(), 0);
    last = end_of(event);
    covered[pid] += event.at("dur").to_number<double>();
  }
  EXPECT_EQ(n_slices, 3U * 50 * 10);
  EXPECT_EQ(last_end.size(), 3U * 4);  // compute, transfer, compression, bubble
  for (const RankTrace& rank : trace.ranks) {
    const auto window = static_cast<double>(rank.end_ns - rank.begin_ns) * 1e-3;
    EXPECT_NEAR(covered[rank.rank], window, 1e-3 * window) << "rank " << rank.rank;
  }
}

TEST(TraceJson, RanksAreOnTheClockOfRankZero) {
  std::mt19937_64 random(1);
  Trace trace;
  for (int rank = 0; rank < 2; ++rank)
    trace.ranks.push_back(busy_rank(rank, 1, rank * 5'000, random));
  trace.ranks[1].clock.end.offset_ns = trace.ranks[1].clock.begin.offset_ns;
  const json::object document = json::parse(trace_json(trace)).as_object();
  std::map<std::int64_t, double> first;
  for (const json::value& value : document.at("traceEvents").as_array()) {
    const json::object& event = value.as_object();
    if (event.at("ph").as_string() != "X") continue;
    first.try_emplace(event.at("pid").as_int64(), event.at("ts").to_number<double>());
  }
  // Both began at the same time, by clocks that are 5 us apart.
  EXPECT_EQ(first.at(0), 0);
  EXPECT_NEAR(first.at(1), 0, 1e-3);
}

TEST(TraceJson, SaysWhatItIsAboutAndHowFarItMayBeOff) {
  std::mt19937_64 random(1);
  Trace trace = some_trace(1, random);
  trace.ranks[2].n_dropped = 17;
  const json::object document = json::parse(trace_json(trace)).as_object();
  const json::object& other = document.at("otherData").as_object();
  EXPECT_EQ(other.at("model").as_string(), "mini");
  EXPECT_EQ(other.at("micro_batches").as_int64(), 4);
  EXPECT_DOUBLE_EQ(other.at("clock_error_us").to_number<double>(), 0.4);
  EXPECT_EQ(other.at("dropped_events").to_number<int>(), 17);
  const json::object& last = other.at("ranks").as_array().at(2).as_object();
  EXPECT_EQ(last.at("dropped_events").to_number<int>(), 17);
  EXPECT_EQ(last.at("events").to_number<int>(), 10);
  EXPECT_DOUBLE_EQ(last.at("clock_error_us").to_number<double>(), 0.4);
  EXPECT_DOUBLE_EQ(last.at("clock_offset_us").to_number<double>(), -3000);
  std::set<std::string> names;
  for (const json::value& value : document.at("traceEvents").as_array()) {
    const json::object& event = value.as_object();
    if (event.at("ph").as_string() == "M") {
      names.insert(std::string(event.at("args").at("name").as_string()));
    }
  }
  EXPECT_EQ(names, (std::set<std::string>{"compute", "transfer", "compression", "bubble",
                                          "scheduler", "rank 0: layers 0-3, cpu \"odd\" \\ name",
                                          "rank 1: layers 4-7, cpu \"odd\" \\ name",
                                          "rank 2: layers 8-11, cpu \"odd\" \\ name"}));
}

TEST(TraceJson, NamesStepsTokensAndBytes) {
  RankTrace rank;
  rank.n_layers = 12;
  rank.device = "cpu";
  rank.end_ns = 1'000'000;
  rank.records = {
      {.kind = TraceKind::kForward,
       .step = 7,
       .begin_ns = 1500,
       .duration_ns = 2250,
       .a = 512,
       .b = 3},
      {.kind = TraceKind::kSend, .step = 7, .begin_ns = 4000, .duration_ns = 100, .c = 65536},
      {.kind = TraceKind::kPlan, .step = 8, .begin_ns = 5000, .b = 2, .c = 2},
      {.kind = TraceKind::kBudgetMove, .begin_ns = 6000, .a = 1, .b = 300000, .c = 225000},
      {.kind = TraceKind::kRequests, .begin_ns = 7000, .a = 4, .b = 9},
      {.kind = TraceKind::kKvUsed, .begin_ns = 8000, .a = 123456}};
  Trace trace;
  trace.micro_batches = 4;
  trace.ranks = {rank};
  const json::value document = json::parse(trace_json(trace));
  std::vector<json::object> events;
  for (const json::value& value : document.at("traceEvents").as_array()) {
    if (value.at("ph").as_string() != "M") events.push_back(value.as_object());
  }
  ASSERT_EQ(events.size(), 7U);
  EXPECT_EQ(events[0].at("name").as_string(), "forward 7 mb 3: 512 prefill + 3 decode");
  EXPECT_EQ(events[0].at("ts").to_number<double>(), 1.5);
  EXPECT_EQ(events[0].at("dur").to_number<double>(), 2.25);
  EXPECT_EQ(events[0].at("args"),
            (json::value{
                {"step", 7}, {"micro_batch", 3}, {"prefill_tokens", 512}, {"decode_tokens", 3}}));
  EXPECT_EQ(events[1].at("name").as_string(), "send 7");
  EXPECT_EQ(events[1].at("args").at("bytes").as_int64(), 65536);
  EXPECT_EQ(events[2].at("ph").as_string(), "i");
  EXPECT_EQ(events[2].at("name").as_string(), "plan 8 mb 0: 2 decode");
  EXPECT_EQ(events[3].at("name").as_string(), "KV budget of stage 1");
  EXPECT_DOUBLE_EQ(events[3].at("args").at("from_ratio").to_number<double>(), 0.3);
  EXPECT_DOUBLE_EQ(events[3].at("args").at("to_ratio").to_number<double>(), 0.225);
  EXPECT_EQ(events[4].at("ph").as_string(), "C");
  EXPECT_EQ(events[4].at("args"), (json::value{{"running", 4}, {"waiting", 9}}));
  EXPECT_EQ(events[5].at("args").at("bytes").as_int64(), 123456);
  EXPECT_EQ(events[6].at("ts").to_number<double>(), 1000);
}

TEST(TraceJson, PiecesAreBoundedAndMakeTheWhole) {
  std::mt19937_64 random(2);
  const Trace trace = some_trace(300, random);
  TraceWriter writer(trace);
  std::string all;
  int n_pieces = 0;
  for (std::string piece; writer.next(piece); ++n_pieces) {
    EXPECT_LT(piece.size(), 128U * 1024);
    all += piece;
  }
  EXPECT_GT(n_pieces, 5);
  EXPECT_EQ(all, trace_json(trace));
  std::string more = "x";
  EXPECT_FALSE(writer.next(more));
  EXPECT_NO_THROW(static_cast<void>(json::parse(trace_json({}))));
}

}  // namespace
}  // namespace spindle::worker
