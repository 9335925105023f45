#pragma once
// HTTP requests and responses as the handlers see them, without sockets.

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/api/http_errors.h"
#include "cluster/api/http_router.h"

namespace spindle::api {

struct HttpRequest {
  std::string method;
  std::string target;
  std::string authorization;
  std::string content_type;
  std::string if_none_match;
  std::string request_id;  // the client's, sanitised, or ours
  std::string body;
  RouteMatch match;
  bool keep_alive = true;
  bool http_1_0 = false;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body = {};
  std::vector<std::pair<std::string, std::string>> headers = {};  // ours; never a client's bytes
};

inline HttpResponse json_response(std::string body, int status = 200) {
  return {.status = status, .body = std::move(body)};
}

HttpResponse error_response(const ApiError& error);

// Errors that only HTTP has.
HttpResponse http_error_response(int status, std::string_view message, std::string_view code);

}  // namespace spindle::api
