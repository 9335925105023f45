#pragma once
// What the cluster did since the last line like it, on rank 0.
//
//   prompt 512.0 tokens/s, generation 96.4 tokens/s, running 7, waiting 2, KV 61.3 % of stage 1,
//   kept 24.8 % of 310.5 MB, preemptions 0, refused 1

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "cluster/engine/engine.h"

namespace spindle::worker {

// From two snapshots, `seconds` apart (above 0). Empty when nothing runs or waits and nothing was
// computed, ended or refused in between.
std::optional<std::string> summary_line(const engine::EngineStats& before,
                                        const engine::EngineStats& now, double seconds);

// A thread that logs the line every `interval`, and once more when it is destroyed, so that the end
// of a short load is not lost.
class SummaryLogger {
 public:
  // `stats` is called on the thread.
  SummaryLogger(std::function<engine::EngineStats()> stats, std::chrono::milliseconds interval);
  ~SummaryLogger();
  SummaryLogger(const SummaryLogger&) = delete;
  SummaryLogger& operator=(const SummaryLogger&) = delete;

 private:
  void run();

  const std::function<engine::EngineStats()> stats_;
  const std::chrono::milliseconds interval_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace spindle::worker
