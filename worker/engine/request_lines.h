#pragma once
// What the log says about one request. No text of it is ever in a line.

#include <string>

#include "cluster/engine/engine.h"

namespace spindle::worker {

// "accepted: 12 prompt tokens, up to 64 generated, n 1, priority 0, KV policy spindle"
std::string accepted_line(const engine::EngineRequest& request);

// "finished: 12 prompt and 64 generated tokens, queued 0.4 ms, first token after 21.0 ms, done
// after 801.3 ms, KV 24.8 % of 1.2 MB"; "failed: ..." and "cancelled: ..." with what there was
// until then.
std::string ended_line(const Status& status, const engine::RequestSummary& summary);

}  // namespace spindle::worker
