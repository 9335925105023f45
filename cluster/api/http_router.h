#pragma once
// Which request goes where, who may send it, and what the answer to a wrong method is.

#include <cstdint>
#include <string>
#include <string_view>

namespace spindle::api {

enum class Route : std::uint8_t {
  kNotFound,
  kMethodNotAllowed,
  kOptions,
  kChatCompletions,
  kCompletions,
  kModels,
  kModel,
  kTokenize,
  kDetokenize,
  kHealth,
  kLive,
  kReady,
  kVersion,
  kMetrics,
  kState,
  kEvents,  // the state as a stream
  kCancelRequest,
  kDrain,
  kLogLevel,
  kTrace,
  kPage,  // a static page given to the server
};

struct RouteMatch {
  Route route = Route::kNotFound;
  // The route's pattern, for metrics; "none" when there is none.
  std::string_view handler = "none";
  // For 405 and OPTIONS: the methods of this path, "GET, HEAD, OPTIONS".
  std::string_view allow;
  // The {id} of the path, decoded.
  std::string argument;
  // Needs the API key when one is set. Everything does but a short list, also what is not found.
  bool needs_key = true;
};

// `target` as on the request line; a query is ignored.
RouteMatch match_route(std::string_view method, std::string_view target);
// A static page, open to everyone; its handler is "page" whatever the path.
RouteMatch match_page(std::string_view method, std::string_view path);

// The path of a target: without query and fragment.
std::string_view target_path(std::string_view target);
// Undoes %XX; a malformed escape stays as it is.
std::string percent_decode(std::string_view text);

// A client's X-Request-Id as it may be logged and echoed: at most 128 characters of
// [A-Za-z0-9._:-]; others are dropped. Empty: make one.
std::string sanitize_request_id(std::string_view value);
// 32 random hexadecimal digits.
std::string make_request_id();

}  // namespace spindle::api
