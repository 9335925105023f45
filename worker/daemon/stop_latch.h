#pragma once
// StopLatch: where "please stop" meets the main thread, whoever says it.

#include <condition_variable>
#include <mutex>
#include <string>
#include <string_view>

namespace spindle::worker {

// Thread-safety: every member may be called from any thread.
class StopLatch {
 public:
  // The first reason counts.
  void request(std::string_view why) {
    const std::lock_guard lock(mutex_);
    if (requested_) return;
    requested_ = true;
    why_ = why;
    changed_.notify_all();
  }

  // Blocks until somebody asked to stop; a server has no deadline for that. Returns why.
  std::string wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return requested_; });
    return why_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool requested_ = false;
  std::string why_;
};

}  // namespace spindle::worker
