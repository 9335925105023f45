#pragma once
// What differs between a terminal and a pipe: colours, control characters, Ctrl-C, lines.

#include <csignal>
#include <string>
#include <string_view>

namespace spindle::cli {

bool is_terminal(int fd);
// Whether the locale of the environment (LC_ALL, LC_CTYPE, LANG) writes UTF-8.
bool locale_is_utf8();

// Decorates text when its descriptor is a terminal that wants colours: not with NO_COLOR set (to
// anything but nothing), not with TERM=dumb.
class Style {
 public:
  explicit Style(int fd);
  explicit Style(bool enabled) : enabled_(enabled) {}

  bool enabled() const { return enabled_; }
  std::string bold(std::string_view text) const { return wrap("1", text); }
  std::string dim(std::string_view text) const { return wrap("2", text); }
  std::string red(std::string_view text) const { return wrap("31", text); }
  std::string green(std::string_view text) const { return wrap("32", text); }

 private:
  std::string wrap(std::string_view code, std::string_view text) const;
  bool enabled_;
};

// The text without control characters (C0 except newline and tab, DEL, C1), which could make a
// terminal do things. For everything that a model or a server wrote and a terminal shows.
std::string printable(std::string_view text);

// While it lives, Ctrl-C does not end the process but makes fd() readable.
// Thread-safety: create it on the main thread while it is the only one.
class InterruptSignal {
 public:
  InterruptSignal();
  ~InterruptSignal();
  InterruptSignal(const InterruptSignal&) = delete;
  InterruptSignal& operator=(const InterruptSignal&) = delete;

  int fd() const { return fd_; }
  // Forgets what was pressed until now; true if anything was.
  bool take() const;

 private:
  sigset_t previous_{};
  int fd_;
};

// Reads lines from a descriptor and returns early on an interrupt.
class LineReader {
 public:
  enum class Outcome { kLine, kEnd, kInterrupted, kTooLong };

  LineReader(int fd, std::size_t max_line_bytes) : fd_(fd), max_line_bytes_(max_line_bytes) {}
  // The line without its newline. Waits as long as the user thinks.
  Outcome read(const InterruptSignal& interrupt, std::string& line);

 private:
  int fd_;
  std::size_t max_line_bytes_;
  std::string buffer_;
  bool ended_ = false;
};

}  // namespace spindle::cli
