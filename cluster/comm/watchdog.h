#pragma once
// Ends the process when a call into a library that takes no deadline does not come back.

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

namespace spindle::comm {

// One write(2) of "spindle: <text>\n" to stderr, so that lines of several ranks do not mix.
void print_to_stderr(std::string_view text);

// If still alive after `limit`: prints `message` and calls _exit(exit_code). Destroying it in time
// disarms it.
//
// Thread-safety: made and destroyed by one thread.
class Watchdog {
 public:
  Watchdog(std::chrono::milliseconds limit, int exit_code, std::string message);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable disarm_;
  bool disarmed_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace spindle::comm
