#include "ops/cli/progress.h"

#include <unistd.h>

#include <iostream>
#include <utility>

#include "ops/cli/output.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

constexpr std::size_t kBarWidth = 24;
constexpr std::chrono::milliseconds kTerminalInterval{100};
constexpr std::chrono::seconds kLineInterval{30};

}  // namespace

std::string progress_text(std::size_t done, std::size_t total, std::size_t done_before,
                          double seconds, const std::string& what) {
  const std::size_t filled = total == 0 ? kBarWidth : kBarWidth * done / total;
  std::string text = "[" + std::string(filled, '#') + std::string(kBarWidth - filled, ' ') + "] " +
                     std::to_string(done) + "/" + std::to_string(total) + " " + what;
  if (done > done_before && done < total) {
    text += ", " +
            format_seconds(seconds * static_cast<double>(total - done) /
                           static_cast<double>(done - done_before)) +
            " left";
  }
  return text;
}

Progress::Progress(std::size_t total, std::size_t done_before, std::string what)
    : terminal_(is_terminal(STDERR_FILENO)),
      total_(total),
      done_before_(done_before),
      what_(std::move(what)),
      done_(done_before) {}

Progress::~Progress() {
  if (terminal_ && shown_) std::cerr << std::endl;
}

void Progress::step() {
  const std::lock_guard lock(mutex_);
  ++done_;
  const auto now = Clock::now();
  const bool due =
      terminal_ ? now - shown_at_ >= kTerminalInterval : now - shown_at_ >= kLineInterval;
  if (due || done_ == total_) {
    shown_at_ = now;
    show();
  }
}

void Progress::show() {
  shown_ = true;
  const std::string text =
      progress_text(done_, total_, done_before_,
                    std::chrono::duration<double>(Clock::now() - start_).count(), what_);
  // Erases what a longer line left.
  std::cerr << (terminal_ ? "\r" + text + "\x1b[K" : text + "\n") << std::flush;
}

}  // namespace spindle::cli
