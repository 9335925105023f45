#include "cluster/api/http_errors.h"

#include <algorithm>

#include "cluster/api/json_text.h"

namespace spindle::api {
namespace {

constexpr std::string_view kInvalidRequest = "invalid_request_error";

std::string object_text(std::string_view message, std::string_view type, std::string_view param,
                        std::string_view code) {
  std::string out = R"({"error":{"message":)";
  append_json_string(out, message);
  out += R"(,"type":)";
  append_json_string(out, type);
  out += R"(,"param":)";
  append_json_string_or_null(out, param);
  out += R"(,"code":)";
  append_json_string_or_null(out, code);
  out += "}}";
  return out;
}

}  // namespace

HttpErrorClass http_error_class(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return {200, "", ""};
    case StatusCode::kInvalidArgument:
      return {400, kInvalidRequest, "invalid_value"};
    case StatusCode::kUnimplemented:
      return {400, kInvalidRequest, "unsupported_parameter"};
    case StatusCode::kUnauthenticated:
      return {401, "authentication_error", "invalid_api_key"};
    case StatusCode::kNotFound:
      return {404, "not_found_error", "not_found"};
    case StatusCode::kTooLarge:
      return {413, kInvalidRequest, "request_too_large"};
    case StatusCode::kResourceExhausted:
      return {503, "service_unavailable_error", "server_is_overloaded"};
    case StatusCode::kUnavailable:
      return {503, "service_unavailable_error", "unavailable"};
    case StatusCode::kDeadlineExceeded:
      return {504, "server_error", "deadline_exceeded"};
    case StatusCode::kCancelled:
      return {499, "server_error", "cancelled"};
    case StatusCode::kInternal:
      return {500, "server_error", "internal_error"};
  }
  return {};
}

std::string error_body(const ApiError& error) {
  const HttpErrorClass group = http_error_class(error.status.code());
  const std::string_view code = error.code.empty() ? group.code : std::string_view(error.code);
  const std::string_view message = error.status.code() == StatusCode::kInternal
                                       ? std::string_view("the server had an internal error")
                                       : std::string_view(error.status.message());
  return object_text(message, group.type, error.param, code);
}

std::string error_body(std::string_view message, std::string_view type, std::string_view code) {
  return object_text(message, type, "", code);
}

std::int64_t retry_after_seconds(const ApiError& error) {
  if (error.retry_after_ms <= 0) return 0;
  return std::max<std::int64_t>(1, (error.retry_after_ms + 999) / 1000);
}

}  // namespace spindle::api
