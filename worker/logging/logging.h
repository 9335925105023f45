#pragma once
// The process's log: one line an event on stderr, as text or as JSON.
//
//   01:02:03.456 rank 0 stage 0 info [req chat-7] finished: ...
//   {"time":"2026-01-02T01:02:03.456Z","level":"info","rank":0,"stage":0,"request_id":"chat-7",
//    "message":"finished: ..."}
//
// A message is one line whatever bytes it has (one_line.h). `stage` is there once it is known,
// the request where the line is about one.
//
// The log is spdlog's default logger. Thread-safety: start_logging once, before threads start; the
// others from any thread.

#include <spdlog/common.h>

#include <memory>
#include <string_view>

#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::worker {

void start_logging(const config::Log& log, int rank);
// From now on every line carries the stage too.
void set_log_stage(const config::Log& log, int rank, int stage);

// "debug", "info", "warning" or "error", in any case.
Result<spdlog::level::level_enum> parse_log_level(std::string_view name);
// From now on, and says so, unless the name is unknown.
Status set_log_level(std::string_view name);

// Whether lines of this level are written: to spare the work of making them.
bool logs(spdlog::level::level_enum level);
// A line about a request. An id that is empty is left out.
void log_request(spdlog::level::level_enum level, std::string_view request_id,
                 std::string_view message);

// How lines are written; `stage` -1: not known. A logger's name is the request's id.
std::unique_ptr<spdlog::formatter> make_log_formatter(config::Log::Format format, int rank,
                                                      int stage);

}  // namespace spindle::worker
