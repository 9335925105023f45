#pragma once
// Status and Result<T>: the outcome of anything that can fail for a reason outside the program:
// bad input, a full pool, a lost peer, a passed deadline. Programmer errors use CHECK (check.h).
//
// Thread-safety: plain values; a Status may be shared between threads while nobody assigns to it.

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/core/check.h"

namespace spindle {

// The same names travel in proto/api.proto (ErrorCode) and map to one HTTP status each
// (cluster/api/http_errors).
enum class StatusCode {
  kOk = 0,
  kInvalidArgument,    // the request or file is wrong; retrying it unchanged cannot help
  kNotFound,           // unknown model, file, request
  kUnauthenticated,    // missing or wrong API key
  kTooLarge,           // a body, frame or file over its byte limit
  kResourceExhausted,  // queue, KV pool or connection limit; retry later
  kUnavailable,        // draining, starting, or a peer is gone
  kDeadlineExceeded,   // a wait ended without its event
  kCancelled,          // the caller asked for it
  kUnimplemented,      // understood but not supported; the message names what
  kInternal,           // a broken invariant that was contained
};

// The canonical upper-case name, e.g. "INVALID_ARGUMENT".
std::string_view status_code_name(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // "INVALID_ARGUMENT: top_p must be in (0, 1], got 2", or "OK".
  std::string to_string() const;
  // The same code with `context` and ": " in front of the message; OK stays OK.
  Status with_context(std::string_view context) const;

  bool operator==(const Status&) const = default;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status ok_status() { return {}; }
inline Status invalid_argument(std::string m) {
  return {StatusCode::kInvalidArgument, std::move(m)};
}
inline Status not_found(std::string m) { return {StatusCode::kNotFound, std::move(m)}; }
inline Status too_large(std::string m) { return {StatusCode::kTooLarge, std::move(m)}; }
inline Status resource_exhausted(std::string m) {
  return {StatusCode::kResourceExhausted, std::move(m)};
}
inline Status unavailable(std::string m) { return {StatusCode::kUnavailable, std::move(m)}; }
inline Status deadline_exceeded(std::string m) {
  return {StatusCode::kDeadlineExceeded, std::move(m)};
}
inline Status cancelled(std::string m) { return {StatusCode::kCancelled, std::move(m)}; }
inline Status unimplemented(std::string m) { return {StatusCode::kUnimplemented, std::move(m)}; }
inline Status internal_error(std::string m) { return {StatusCode::kInternal, std::move(m)}; }

// A value or the Status that explains its absence. Accessing the value of a failed Result is a
// programmer error.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT: implicit on purpose
  Result(Status status) : status_(std::move(status)) {  // NOLINT: implicit on purpose
    CHECK(!status_.ok(), "a Result without a value needs an error");
  }

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }

  T& value() & {
    require_value();
    return *value_;
  }
  const T& value() const& {
    require_value();
    return *value_;
  }
  // By value, so that a loop over `*make_result()` does not look into a dead temporary.
  T value() && {
    require_value();
    return *std::move(value_);
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  void require_value() const {
    if (!ok()) [[unlikely]] {
      CHECK(false, status_.to_string());  // the text is made only when it is needed
    }
  }

  std::optional<T> value_;
  Status status_;
};

}  // namespace spindle
