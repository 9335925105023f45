#include "cluster/comm/watchdog.h"

#include <csignal>
#include <system_error>
#include <utility>

#include <unistd.h>

namespace spindle::comm {

void print_to_stderr(std::string_view text) {
  const std::string line = "spindle: " + std::string(text) + "\n";
  // Nothing can be done about a closed stderr.
  static_cast<void>(!::write(STDERR_FILENO, line.data(), line.size()));
}

Watchdog::Watchdog(std::chrono::milliseconds limit, int exit_code, std::string message) {
  try {
    thread_ = std::thread([this, limit, exit_code, message = std::move(message)] {
      std::unique_lock lock(mutex_);
      const auto end = std::chrono::steady_clock::now() + limit;
      if (disarm_.wait_until(lock, end, [this] { return disarmed_; })) return;
      print_to_stderr(message);
      ::_exit(exit_code);
    });
  } catch (const std::system_error&) {
    // No thread to be had: let the kernel do it, without the message and the exit code.
    std::signal(SIGALRM, SIG_DFL);
    ::alarm(static_cast<unsigned>(limit.count() / 1000 + 1));
  }
}

Watchdog::~Watchdog() {
  if (!thread_.joinable()) {
    ::alarm(0);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    disarmed_ = true;
  }
  disarm_.notify_all();
  thread_.join();
}

}  // namespace spindle::comm
