#pragma once
// The command line of spindled. Precedence: flag, then environment (SPINDLE_API_KEY alone), then
// the configuration file, then the default.

#include <string>
#include <string_view>

#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::config {

// The version of this build, e.g. "0.1.0".
std::string_view spindle_version();

struct Options {
  // Complete and valid: every default that can be known before start is written out. Empty when
  // `text` is not.
  Config config;
  // --print-config: print effective_config_text(config) and leave.
  bool print_config = false;
  // --help and --version: print this and leave with 0.
  std::string text;
};

// Named flags apply first and --set next, each in the order given. A relative path on the command
// line is taken from the working directory; one in the file, from the file's folder.
// INVALID_ARGUMENT names the flag or field at fault; so do the errors of load_config_file.
// Reads the environment, so call it before other threads start.
Result<Options> parse_command_line(int argc, const char* const* argv);

}  // namespace spindle::config
