#pragma once
// What /v1/spindle/state answers: one snapshot of the engine for dashboards and people.

#include <cstdint>
#include <string>

#include "cluster/engine/engine.h"
#include "cluster/telemetry/metrics.h"

namespace spindle::api {

struct StateContext {
  std::string model;
  std::string version;
  std::int32_t max_model_len = 0;
  double uptime_seconds = 0;
  std::int64_t unix_ms = 0;
};

// One JSON object, documented in README.md. Its size is bounded by the cluster's shape: about 160
// bytes for a layer, 800 for a stage, 300 for each of the moves and 250 for each of the requests
// that a snapshot may hold, and a few thousand. Thread-safety: pure.
std::string state_json(const StateContext& context, const engine::EngineSnapshot& snapshot,
                       const telemetry::Latencies& latencies);

}  // namespace spindle::api
