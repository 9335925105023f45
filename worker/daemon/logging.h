#pragma once
// The process's log: one line an event on stderr, as text or as JSON.

#include "proto/config.pb.h"

namespace spindle::worker {

// Sets spdlog's default logger; call once, before threads start. Every line carries the rank.
// JSON lines have the fields time (UTC, ISO 8601), level, rank, message.
void start_logging(const config::Log& log, int rank);

}  // namespace spindle::worker
