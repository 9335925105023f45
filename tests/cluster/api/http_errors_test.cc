#include "cluster/api/http_errors.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "cluster/api/json_text.h"

namespace spindle::api {
namespace {

TEST(HttpErrors, MapsEveryStatus) {
  EXPECT_EQ(http_error_class(StatusCode::kInvalidArgument).http_status, 400);
  EXPECT_EQ(http_error_class(StatusCode::kUnimplemented).http_status, 400);
  EXPECT_EQ(http_error_class(StatusCode::kUnauthenticated).http_status, 401);
  EXPECT_EQ(http_error_class(StatusCode::kNotFound).http_status, 404);
  EXPECT_EQ(http_error_class(StatusCode::kTooLarge).http_status, 413);
  EXPECT_EQ(http_error_class(StatusCode::kResourceExhausted).http_status, 503);
  EXPECT_EQ(http_error_class(StatusCode::kUnavailable).http_status, 503);
  EXPECT_EQ(http_error_class(StatusCode::kDeadlineExceeded).http_status, 504);
  EXPECT_EQ(http_error_class(StatusCode::kInternal).http_status, 500);
}

TEST(HttpErrors, WritesOpenAisObject) {
  EXPECT_EQ(error_body(ApiError{invalid_argument("top_p must be \"small\""), "top_p"}),
            R"({"error":{"message":"top_p must be \"small\"","type":"invalid_request_error",)"
            R"("param":"top_p","code":"invalid_value"}})");
  EXPECT_EQ(error_body(ApiError{resource_exhausted("full")}),
            R"({"error":{"message":"full","type":"service_unavailable_error","param":null,)"
            R"("code":"server_is_overloaded"}})");
}

TEST(HttpErrors, KeepsInternalsInside) {
  EXPECT_EQ(error_body(ApiError{internal_error("/dev/shm/secret")}).find("secret"),
            std::string::npos);
}

TEST(HttpErrors, RoundsRetryAfterUp) {
  EXPECT_EQ(retry_after_seconds({.status = {}, .retry_after_ms = 0}), 0);
  EXPECT_EQ(retry_after_seconds({.status = {}, .retry_after_ms = 1}), 1);
  EXPECT_EQ(retry_after_seconds({.status = {}, .retry_after_ms = 1000}), 1);
  EXPECT_EQ(retry_after_seconds({.status = {}, .retry_after_ms = 1001}), 2);
}

TEST(JsonText, EscapesStrings) {
  std::string out;
  append_json_string(out, std::string("a\"\\\n\r\t\x01/é\0z", 12));
  EXPECT_EQ(out, "\"a\\\"\\\\\\n\\r\\t\\u0001/é\\u0000z\"");
  out.clear();
  append_json_string(out, "x\xffy");
  EXPECT_EQ(out, "\"x\xEF\xBF\xBDy\"");
}

TEST(JsonText, WritesLogprobs) {
  std::string out;
  append_json_logprob(out, -0.25F);
  out += ' ';
  append_json_logprob(out, -std::numeric_limits<float>::infinity());
  out += ' ';
  append_json_logprob(out, 0.1F);
  EXPECT_EQ(out, "-0.25 -9999 0.1");
}

}  // namespace
}  // namespace spindle::api
