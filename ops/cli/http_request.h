#pragma once
// One HTTP POST to a cluster, for what the TCP API does not carry.

#include <chrono>
#include <functional>
#include <string>
#include <string_view>

#include "kernels/core/status.h"
#include "ops/cli/options.h"

namespace spindle::cli {

// What add_connection_options() may change. The time limit is for the next byte of the answer.
inline const ConnectionOptions kHttpConnection{.port = 8000, .timeout_s = 30};
inline constexpr const char* kHttpPortHelp = "Server's HTTP port, not that of the TCP API";

struct HttpAnswer {
  int status = 0;    // 0: there was none, see `failure`
  Status failure;    // of the connection: UNAVAILABLE or DEADLINE_EXCEEDED before it stood,
                     // INTERNAL when it broke, CANCELLED
  std::string body;  // of an answer that is no 200: its first 64 KiB
};

// Sends `body` (JSON) and hands the body of a 200 over as it comes; `on_data` returns false to give
// up (CANCELLED). `quiet`: how much longer than the options say the answer may take to begin. The
// descriptor `cancel_fd` becoming readable ends it with CANCELLED.
HttpAnswer http_post(const ConnectionOptions& options, const std::string& target,
                     const std::string& body, std::chrono::milliseconds quiet, int cancel_fd,
                     const std::function<bool(std::string_view data)>& on_data);

// The exit code for an answer that is no 200, after saying what is wrong.
int report_http_failure(const HttpAnswer& answer, const ConnectionOptions& options);

}  // namespace spindle::cli
