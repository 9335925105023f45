#include "ops/cli/terminal.h"

#include <poll.h>
#include <pthread.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <array>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include "kernels/core/check.h"

namespace spindle::cli {
namespace {

bool wants_colours() {
  const char* no_color = std::getenv("NO_COLOR");
  const char* term = std::getenv("TERM");
  return (no_color == nullptr || *no_color == '\0') &&
         (term == nullptr || std::string_view(term) != "dumb");
}

}  // namespace

bool is_terminal(int fd) { return ::isatty(fd) == 1; }

bool locale_is_utf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') {
      continue;
    }
    std::string letters;  // "de_DE.UTF-8" and "C.utf8" alike
    for (const char* c = value; *c != '\0'; ++c) {
      if (*c != '-')
        letters.push_back(static_cast<char>(std::tolower(static_cast<unsigned char>(*c))));
    }
    return letters.find("utf8") != std::string::npos;
  }
  return false;
}

Style::Style(int fd) : enabled_(is_terminal(fd) && wants_colours()) {}

std::string Style::wrap(std::string_view code, std::string_view text) const {
  if (!enabled_) {
    return std::string(text);
  }
  std::string out = "\x1b[";
  out.append(code).append("m").append(text).append("\x1b[0m");
  return out;
}

std::string printable(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    // U+0080 to U+009F are C2 80 to C2 9F.
    if (byte == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0) {
      ++i;
    } else if (byte >= 0x20 ? byte != 0x7F : (byte == '\n' || byte == '\t')) {
      out.push_back(text[i]);
    }
  }
  return out;
}

InterruptSignal::InterruptSignal() {
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  CHECK(pthread_sigmask(SIG_BLOCK, &interrupt, &previous_) == 0, "cannot block SIGINT");
  fd_ = ::signalfd(-1, &interrupt, SFD_NONBLOCK | SFD_CLOEXEC);
  CHECK(fd_ >= 0, "signalfd failed");
}

InterruptSignal::~InterruptSignal() {
  take();
  ::close(fd_);
  pthread_sigmask(SIG_SETMASK, &previous_, nullptr);
}

bool InterruptSignal::take() const {
  bool any = false;
  signalfd_siginfo info{};
  while (::read(fd_, &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
    any = true;
  }
  return any;
}

LineReader::Outcome LineReader::read(const InterruptSignal& interrupt, std::string& line) {
  for (;;) {
    if (const std::size_t end = buffer_.find('\n'); end != std::string::npos) {
      line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      return Outcome::kLine;
    }
    if (ended_) {
      line = std::exchange(buffer_, {});
      return line.empty() ? Outcome::kEnd : Outcome::kLine;
    }
    if (buffer_.size() > max_line_bytes_) {
      return Outcome::kTooLong;
    }
    std::array<pollfd, 2> waits{{{.fd = fd_, .events = POLLIN, .revents = 0},
                                 {.fd = interrupt.fd(), .events = POLLIN, .revents = 0}}};
    if (::poll(waits.data(), waits.size(), -1) < 0 && errno != EINTR) {
      return Outcome::kEnd;
    }
    if (interrupt.take()) {
      buffer_.clear();
      return Outcome::kInterrupted;
    }
    if (waits[0].revents != 0) {
      std::array<char, 65536> bytes;
      const ssize_t n = ::read(fd_, bytes.data(), bytes.size());
      if (n > 0) {
        buffer_.append(bytes.data(), static_cast<std::size_t>(n));
      } else if (n == 0 || errno != EINTR) {
        ended_ = true;
      }
    }
  }
}

}  // namespace spindle::cli
