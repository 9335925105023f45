#pragma once
// Between the messages of proto/api.proto and the values of completion.h and engine.h.
// Nothing here judges a value: ranges are the completion service's business.

#include <cstddef>
#include <deque>
#include <string>

#include "cluster/api/completion.h"
#include "cluster/engine/engine.h"
#include "proto/api.pb.h"

namespace spindle::api {

// Error texts may quote a client's input; what goes out is cut to this, at a character boundary.
inline constexpr std::size_t kMaxErrorMessageBytes = 1024;

// Heads of a Usage's boundaries; what is over is left out, of the earliest boundaries first.
inline constexpr std::size_t kMaxUsageHeads = 20'000;

// The request, or the field at fault (no prompt).
struct ParsedRequest {
  GenerateRequest request;
  ApiError error;  // OK status: `request` is usable
};
ParsedRequest to_generate_request(v1::GenerateRequest&& message);

v1::Delta to_message(OutputDelta&& delta);
v1::Usage to_message(const engine::RequestSummary& summary);
// Memory and bytes on the wire, about.
std::size_t score_bytes(const engine::PromptScore& score);
// Moves scores from the front of `scores` to `message`: as many as fit into `max_bytes`, at least
// one.
void move_scores(std::deque<engine::PromptScore>& scores, std::size_t max_bytes,
                 v1::Scores& message);
// A sampling field keeps its place in the message: "top_p" becomes "sampling.top_p".
v1::Error to_message(const ApiError& error);
v1::Stats to_message(const engine::EngineStats& stats);

}  // namespace spindle::api
