#include "kernels/core/check.h"

#include <cstdio>
#include <cstdlib>

namespace spindle {

void check_failed(std::string_view message, const std::source_location& where) {
  std::fprintf(stderr, "CHECK failed at %s:%u in %s%s%.*s\n", where.file_name(),
               static_cast<unsigned>(where.line()), where.function_name(),
               message.empty() ? "" : ": ", static_cast<int>(message.size()), message.data());
  std::fflush(stderr);
  std::abort();
}

}  // namespace spindle
