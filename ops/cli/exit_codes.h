#pragma once
// What `spindle` tells its caller; documented by `spindle --help` and README.md.

namespace spindle::cli {

enum ExitCode : int {
  kExitOk = 0,
  kExitRequestFailed = 1,
  kExitUsage = 2,          // wrong options or input
  kExitCannotConnect = 3,  // nobody listens, or the server refused the connection
  kExitInterrupted = 130,  // Ctrl-C
};

}  // namespace spindle::cli
