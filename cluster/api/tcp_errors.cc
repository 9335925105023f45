#include "cluster/api/tcp_errors.h"

#include <array>
#include <utility>

namespace spindle::api {
namespace {

constexpr std::array<std::pair<StatusCode, v1::ErrorCode>, 11> kCodes{{
    {StatusCode::kOk, v1::OK},
    {StatusCode::kInvalidArgument, v1::INVALID_ARGUMENT},
    {StatusCode::kNotFound, v1::NOT_FOUND},
    {StatusCode::kUnauthenticated, v1::UNAUTHENTICATED},
    {StatusCode::kTooLarge, v1::TOO_LARGE},
    {StatusCode::kResourceExhausted, v1::RESOURCE_EXHAUSTED},
    {StatusCode::kUnavailable, v1::UNAVAILABLE},
    {StatusCode::kDeadlineExceeded, v1::DEADLINE_EXCEEDED},
    {StatusCode::kCancelled, v1::CANCELLED_BY_CLIENT},
    {StatusCode::kUnimplemented, v1::UNIMPLEMENTED},
    {StatusCode::kInternal, v1::INTERNAL},
}};

}  // namespace

v1::ErrorCode error_code_of(StatusCode code) {
  for (const auto& [status, wire] : kCodes) {
    if (status == code) {
      return wire;
    }
  }
  return v1::INTERNAL;
}

StatusCode status_code_of(v1::ErrorCode code) {
  for (const auto& [status, wire] : kCodes) {
    if (wire == code) {
      return status;
    }
  }
  return StatusCode::kInternal;
}

Status status_of(const v1::Error& error) {
  const StatusCode code = status_code_of(error.code());
  if (code == StatusCode::kOk) {
    return internal_error("the server sent an error without a code: " + error.message());
  }
  return {code, error.message()};
}

}  // namespace spindle::api
