#include "worker/logging/summary_line.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <memory>
#include <sstream>
#include <string>

namespace spindle::worker {
namespace {

using engine::EngineStats;
using testing::HasSubstr;

EngineStats some_stats() {
  EngineStats stats;
  stats.prompt_tokens = 1000;
  stats.generation_tokens = 400;
  stats.accepted = 5;
  stats.preemptions = 2;
  stats.refused = 3;
  stats.stages.resize(2);
  for (int i = 0; i < 2; ++i) {
    stats.stages[static_cast<std::size_t>(i)].stage = i;
    stats.stages[static_cast<std::size_t>(i)].kv_capacity_bytes = 1000;
  }
  return stats;
}

TEST(SummaryLine, FiguresAreTheDifferencesOfTheStats) {
  const EngineStats before = some_stats();
  EngineStats now = before;
  now.prompt_tokens += 5120;
  now.generation_tokens += 964;
  now.running = 7;
  now.waiting = 2;
  now.preemptions += 4;
  now.refused += 1;
  now.stages[0].kv_used_bytes = 250;
  now.stages[1].kv_used_bytes = 613;
  for (auto& stage : now.stages) {
    stage.layers.resize(2);
    stage.layers[0].full_bytes = stage.layers[1].full_bytes = 1'000'000;
    stage.layers[0].used_bytes = 100'000;
    stage.layers[1].used_bytes = 396'000;
  }
  EXPECT_EQ(summary_line(before, now, 10),
            "prompt 512.0 tokens/s, generation 96.4 tokens/s, running 7, waiting 2, KV 61.3 % of "
            "stage 1, kept 24.8 % of 4.0 MB, preemptions 4, refused 1");
}

TEST(SummaryLine, NothingHappenedNothingIsSaid) {
  const EngineStats stats = some_stats();
  EXPECT_FALSE(summary_line(stats, stats, 10).has_value());
  EngineStats now = stats;
  now.stages[0].kv_used_bytes = 100;  // a kept session is no event
  EXPECT_FALSE(summary_line(stats, now, 10).has_value());
  now = stats;
  now.refused += 1;
  EXPECT_TRUE(summary_line(stats, now, 10).has_value());
  now = stats;
  now.waiting = 1;
  EXPECT_TRUE(summary_line(stats, now, 10).has_value());
}

TEST(SummaryLogger, LogsByItselfAndOnceMoreAtItsEnd) {
  std::ostringstream out;
  const auto old = spdlog::default_logger();
  spdlog::set_default_logger(
      std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::ostream_sink_mt>(out)));
  std::atomic<int> n_calls{0};
  const auto stats = [&n_calls] {
    EngineStats now = some_stats();
    now.generation_tokens += static_cast<std::uint64_t>(10 * n_calls++);
    return now;
  };
  {
    const SummaryLogger logger(stats, std::chrono::hours(1));
    while (n_calls == 0) std::this_thread::yield();
  }
  EXPECT_EQ(n_calls, 2);
  EXPECT_THAT(out.str(), HasSubstr("generation "));
  {
    const SummaryLogger logger(stats, std::chrono::milliseconds(1));
    while (n_calls < 6) std::this_thread::yield();
  }
  spdlog::set_default_logger(old);
}

}  // namespace
}  // namespace spindle::worker
