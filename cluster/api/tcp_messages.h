#pragma once
// Between the messages of proto/api.proto and the values of completion.h and engine.h.
// Nothing here judges a value: ranges are the completion service's business.

#include <string>

#include "cluster/api/completion.h"
#include "cluster/engine/engine.h"
#include "proto/api.pb.h"

namespace spindle::api {

// Error texts may quote a client's input; what goes out is cut to this, at a character boundary.
inline constexpr std::size_t kMaxErrorMessageBytes = 1024;

// The request, or the field at fault (no prompt).
struct ParsedRequest {
  GenerateRequest request;
  ApiError error;  // OK status: `request` is usable
};
ParsedRequest to_generate_request(v1::GenerateRequest&& message);

v1::Delta to_message(OutputDelta&& delta);
v1::Usage to_message(const engine::RequestSummary& summary);
// A sampling field keeps its place in the message: "top_p" becomes "sampling.top_p".
v1::Error to_message(const ApiError& error);
v1::Stats to_message(const engine::EngineStats& stats);

}  // namespace spindle::api
