#include "worker/logging/summary_line.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <utility>

namespace spindle::worker {
namespace {

using engine::EngineStats;
using engine::StageState;

bool something_happened(const EngineStats& before, const EngineStats& now) {
  return now.running > 0 || now.waiting > 0 || now.prompt_tokens != before.prompt_tokens ||
         now.generation_tokens != before.generation_tokens || now.accepted != before.accepted ||
         now.finished != before.finished || now.failed != before.failed ||
         now.cancelled != before.cancelled || now.refused != before.refused;
}

double share_used(const StageState& stage) {
  if (stage.kv_capacity_bytes == 0) return 0;
  return static_cast<double>(stage.kv_used_bytes) / static_cast<double>(stage.kv_capacity_bytes);
}

}  // namespace

std::optional<std::string> summary_line(const EngineStats& before, const EngineStats& now,
                                        double seconds) {
  if (!something_happened(before, now)) return std::nullopt;
  const auto rate = [seconds](std::uint64_t from, std::uint64_t to) {
    return static_cast<double>(to - from) / seconds;
  };
  std::string line =
      fmt::format("prompt {:.1f} tokens/s, generation {:.1f} tokens/s, running {}, waiting {}",
                  rate(before.prompt_tokens, now.prompt_tokens),
                  rate(before.generation_tokens, now.generation_tokens), now.running, now.waiting);
  const StageState* fullest = nullptr;
  for (const StageState& stage : now.stages) {
    if (fullest == nullptr || share_used(stage) > share_used(*fullest)) fullest = &stage;
  }
  if (fullest != nullptr) {
    line += fmt::format(", KV {:.1f} % of stage {}", 100 * share_used(*fullest), fullest->stage);
  }
  std::uint64_t full = 0;
  std::uint64_t kept = 0;
  for (const StageState& stage : now.stages) {
    for (const engine::LayerState& layer : stage.layers) {
      full += layer.full_bytes;
      kept += layer.used_bytes;
    }
  }
  if (full > 0) {
    line += fmt::format(", kept {:.1f} % of {:.1f} MB",
                        100 * static_cast<double>(kept) / static_cast<double>(full),
                        static_cast<double>(full) / 1e6);
  }
  return line + fmt::format(", preemptions {}, refused {}", now.preemptions - before.preemptions,
                            now.refused - before.refused);
}

SummaryLogger::SummaryLogger(std::function<EngineStats()> stats, std::chrono::milliseconds interval)
    : stats_(std::move(stats)), interval_(interval), thread_([this] { run(); }) {}

SummaryLogger::~SummaryLogger() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
}

void SummaryLogger::run() {
  using Clock = std::chrono::steady_clock;
  EngineStats before = stats_();
  Clock::time_point then = Clock::now();
  std::unique_lock lock(mutex_);
  for (bool last = false; !last;) {
    last = stop_.wait_for(lock, interval_, [this] { return stopping_; });
    lock.unlock();
    EngineStats now = stats_();
    const Clock::time_point at = Clock::now();
    const double seconds = std::chrono::duration<double>(at - then).count();
    if (const auto line = summary_line(before, now, std::max(seconds, 1e-3))) {
      spdlog::info("{}", *line);
    }
    before = std::move(now);
    then = at;
    lock.lock();
  }
}

}  // namespace spindle::worker
