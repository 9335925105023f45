#pragma once
// One mapping from Status to HTTP status and OpenAI error object, for every endpoint.

#include <cstdint>
#include <string>
#include <string_view>

#include "cluster/api/completion.h"
#include "kernels/core/status.h"

namespace spindle::api {

struct HttpErrorClass {
  int http_status = 500;
  std::string_view type = "server_error";  // OpenAI's "type"
  std::string_view code = {};              // OpenAI's "code"; empty: null
};

// 400 for everything wrong with a request (also UNIMPLEMENTED), 401, 404, 413, 503 for overload and
// draining, 504 for a missed deadline, 499 for a cancelled request, 500 otherwise.
HttpErrorClass http_error_class(StatusCode code);

// {"error":{"message","type","param","code"}}. INTERNAL errors show a fixed text, so that no name
// from inside the server leaves it.
std::string error_body(const ApiError& error);
// The same for an error that HTTP itself has and Status has not: 405, 408, 415, 431.
std::string error_body(std::string_view message, std::string_view type, std::string_view code);

// Whole seconds for Retry-After, at least 1; 0: no such header.
std::int64_t retry_after_seconds(const ApiError& error);

}  // namespace spindle::api
