#pragma once
// `spindle trace` and `spindle log-level`: look closer at a running cluster.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "ops/cli/http_request.h"

namespace spindle::cli {

struct TraceOptions {
  ConnectionOptions connection = kHttpConnection;
  double seconds = 5;
  std::int64_t max_events = 65536;
  std::string output = "trace.json";
};

struct LogLevelOptions {
  ConnectionOptions connection = kHttpConnection;
  std::string level;
};

void add_trace_options(CLI::App& app, TraceOptions& options);
void add_log_level_options(CLI::App& app, LogLevelOptions& options);
// Both return the exit code.
int run_trace(const TraceOptions& options);
int run_log_level(const LogLevelOptions& options);

}  // namespace spindle::cli
