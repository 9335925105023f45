#pragma once
// CHECK: invariants of our own code. A failed CHECK is a bug in Spindle: it prints where and why
// and aborts the process, and the launcher ends the job. Nothing a user, a file or a peer sends may
// reach one; such failures are Status values (status.h).

#include <source_location>
#include <string_view>

namespace spindle {

[[noreturn]] void check_failed(std::string_view message, const std::source_location& where);

inline void CHECK(bool condition, std::string_view message = "",
                  const std::source_location& where = std::source_location::current()) {
  if (!condition) [[unlikely]] {
    check_failed(message, where);
  }
}

}  // namespace spindle
