#pragma once
// How answers, errors and usage are shown.

#include <boost/json.hpp>
#include <cstdint>
#include <string>

#include "cluster/api/tcp_client.h"
#include "ops/cli/options.h"

namespace spindle::cli {

std::string format_bytes(std::uint64_t n_bytes);  // "16.0 MiB"
std::string format_seconds(double seconds);       // "0.5 s", "3 min 2 s", "2 h 5 min"

// "prompt 3 tokens, output 6 tokens, first token after 20 ms, 50.0 tokens/s, KV kept 2.0 KiB of
// 8.0 KiB (25%)"
std::string usage_line(const api::v1::Usage& usage);

// {"request_id", "model", "choices": [...], "usage": {...}}, and "error" when it failed.
boost::json::object to_json(const api::GenerateOutcome& outcome, const std::string& model);

// What a person needs to know about a failed request.
std::string error_text(const api::GenerateOutcome& outcome);

// "spindle: TEXT" on standard error.
void print_error(const std::string& text);
// The same for a failed connect(), with what to do about it; returns the exit code.
int report_connect_error(const Status& status, const ConnectionOptions& options);
// For wrong input; returns the exit code.
int report_usage_error(const Status& status);

// Prints what is due at the end of a request (JSON, usage, the error); returns the exit code.
int report_outcome(const api::GenerateOutcome& outcome, const std::string& model,
                   const OutputOptions& options);

// Writes text to standard output and flushes; without control characters if that is a terminal.
// Remembers whether the line is finished.
class StreamPrinter {
 public:
  StreamPrinter();
  void print(const std::string& text);
  // On a terminal, ends a line that was begun.
  void end_line();

 private:
  bool terminal_;
  bool line_begun_ = false;
};

}  // namespace spindle::cli
