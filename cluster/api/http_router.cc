#include "cluster/api/http_router.h"

#include <openssl/rand.h>

#include <array>
#include <charconv>

#include "kernels/core/check.h"

namespace spindle::api {
namespace {

struct RouteEntry {
  std::string_view path;
  std::string_view method;
  Route route;
  bool open;  // without API key
};

// The open list is vLLM's, plus /live and /ready: probes and scrapers have no key. The state says
// little more than the metrics, and is as open as they are.
constexpr std::array kRoutes{
    RouteEntry{"/v1/chat/completions", "POST", Route::kChatCompletions, false},
    RouteEntry{"/v1/completions", "POST", Route::kCompletions, false},
    RouteEntry{"/v1/models", "GET", Route::kModels, false},
    RouteEntry{"/tokenize", "POST", Route::kTokenize, false},
    RouteEntry{"/detokenize", "POST", Route::kDetokenize, false},
    RouteEntry{"/health", "GET", Route::kHealth, true},
    RouteEntry{"/live", "GET", Route::kLive, true},
    RouteEntry{"/ready", "GET", Route::kReady, true},
    RouteEntry{"/version", "GET", Route::kVersion, true},
    RouteEntry{"/metrics", "GET", Route::kMetrics, true},
    RouteEntry{"/v1/spindle/state", "GET", Route::kState, true},
    RouteEntry{"/v1/spindle/events", "GET", Route::kEvents, true},
    RouteEntry{"/v1/spindle/drain", "POST", Route::kDrain, false},
    RouteEntry{"/v1/spindle/log_level", "POST", Route::kLogLevel, false},
    RouteEntry{"/v1/spindle/trace", "POST", Route::kTrace, false},
};
// Paths with an id in them: what comes before it and after it.
struct IdRoute {
  std::string_view before;
  std::string_view after;
  RouteEntry entry;
};
constexpr std::array kIdRoutes{
    IdRoute{"/v1/models/", "", {"/v1/models/{id}", "GET", Route::kModel, false}},
    IdRoute{"/v1/spindle/requests/",
            "/cancel",
            {"/v1/spindle/requests/{id}/cancel", "POST", Route::kCancelRequest, false}},
};
constexpr std::size_t kMaxRequestIdBytes = 128;

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

RouteMatch matched(const RouteEntry& entry, std::string_view method) {
  const bool is_get = entry.method == "GET";
  RouteMatch match;
  match.handler = entry.path;
  match.allow = is_get ? "GET, HEAD, OPTIONS" : "POST, OPTIONS";
  match.needs_key = !entry.open;
  if (method == entry.method || (is_get && method == "HEAD")) {
    match.route = entry.route;
  } else if (method == "OPTIONS") {
    match.route = Route::kOptions;
  } else {
    match.route = Route::kMethodNotAllowed;
  }
  return match;
}

}  // namespace

std::string_view target_path(std::string_view target) {
  return target.substr(0, target.find_first_of("?#"));
}

std::string percent_decode(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size()) {
      const int high = hex_digit(text[i + 1]);
      const int low = hex_digit(text[i + 2]);
      if (high >= 0 && low >= 0) {
        out += static_cast<char>(high * 16 + low);
        i += 2;
        continue;
      }
    }
    out += text[i];
  }
  return out;
}

RouteMatch match_route(std::string_view method, std::string_view target) {
  const std::string_view path = target_path(target);
  for (const RouteEntry& entry : kRoutes) {
    if (path == entry.path) return matched(entry, method);
  }
  for (const IdRoute& route : kIdRoutes) {
    const std::size_t around = route.before.size() + route.after.size();
    if (path.size() <= around || !path.starts_with(route.before) || !path.ends_with(route.after)) {
      continue;
    }
    RouteMatch match = matched(route.entry, method);
    match.argument = percent_decode(path.substr(route.before.size(), path.size() - around));
    return match;
  }
  return {};
}

RouteMatch match_page(std::string_view method, std::string_view path) {
  RouteMatch match = matched({path, "GET", Route::kPage, true}, method);
  match.handler = "page";  // one label for all of them
  return match;
}

std::string sanitize_request_id(std::string_view value) {
  std::string out;
  for (const char c : value.substr(0, kMaxRequestIdBytes)) {
    const bool allowed = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                         (c >= '0' && c <= '9') || c == '.' || c == '_' || c == ':' || c == '-';
    if (allowed) out += c;
  }
  return out;
}

std::string make_request_id() {
  std::array<unsigned char, 16> bytes{};
  CHECK(RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) == 1, "no random bytes");
  static constexpr std::string_view kHex = "0123456789abcdef";
  std::string id;
  for (const unsigned char byte : bytes) {
    id += kHex[byte >> 4];
    id += kHex[byte & 0xF];
  }
  return id;
}

}  // namespace spindle::api
