#pragma once
// What this build is: for --version, so that a report of a fault can name it.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <string>
#include <string_view>

namespace spindle {

struct BuildInfo {
  std::string_view version;  // of the project, e.g. "0.1.0"
  std::string_view commit;   // that HEAD was at, 12 hexadecimal digits; empty outside git
  bool has_cuda = false;     // the CUDA bodies are in it
};

BuildInfo build_info();

// "PROGRAM VERSION", then one line each for the commit (where it is known), CUDA and the TCP API's
// protocol; ends with a line break.
std::string version_text(std::string_view program, const BuildInfo& build,
                         std::uint32_t protocol_major, std::uint32_t protocol_minor);

}  // namespace spindle
