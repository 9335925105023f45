#pragma once
// How far a long run is, on standard error: a bar on a terminal, else a line now and then.

#include <chrono>
#include <cstddef>
#include <mutex>
#include <string>

namespace spindle::cli {

// "[#####     ] 120/240 cells, 2 min 3 s left"; the time from what was done since the start. `what`
// is what is counted.
std::string progress_text(std::size_t done, std::size_t total, std::size_t done_before,
                          double seconds, const std::string& what);

// Thread-safety: step() may be called from any thread.
class Progress {
 public:
  Progress(std::size_t total, std::size_t done_before, std::string what);
  ~Progress();  // ends the bar's line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void step();

 private:
  using Clock = std::chrono::steady_clock;
  void show();

  const bool terminal_;
  const std::size_t total_;
  const std::size_t done_before_;
  const std::string what_;
  const Clock::time_point start_ = Clock::now();
  std::mutex mutex_;
  std::size_t done_;
  Clock::time_point shown_at_ = start_;
  bool shown_ = false;
};

}  // namespace spindle::cli
