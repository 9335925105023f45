#include "cluster/api/http_router.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace spindle::api {
namespace {

TEST(HttpRouter, FindsEveryRoute) {
  EXPECT_EQ(match_route("POST", "/v1/chat/completions").route, Route::kChatCompletions);
  EXPECT_EQ(match_route("POST", "/v1/completions?x=1").route, Route::kCompletions);
  EXPECT_EQ(match_route("GET", "/v1/models").route, Route::kModels);
  EXPECT_EQ(match_route("HEAD", "/v1/models").route, Route::kModels);
  EXPECT_EQ(match_route("POST", "/tokenize").route, Route::kTokenize);
  EXPECT_EQ(match_route("GET", "/metrics").route, Route::kMetrics);
  EXPECT_EQ(match_route("POST", "/v1/spindle/drain").route, Route::kDrain);
  EXPECT_EQ(match_route("GET", "/v1/spindle/drain").route, Route::kMethodNotAllowed);
  EXPECT_EQ(match_route("OPTIONS", "/v1/spindle/drain").route, Route::kOptions);
  EXPECT_EQ(match_route("DELETE", "/health").allow, "GET, HEAD, OPTIONS");
  for (const char* path : {"", "/", "/v1", "/v1/models/", "/v1/completions/", "//health", "/HEALTH",
                           "/v1/../metrics", "*"}) {
    EXPECT_EQ(match_route("GET", path).route, Route::kNotFound) << path;
  }
}

TEST(HttpRouter, DecodesTheModelId) {
  const RouteMatch match = match_route("GET", "/v1/models/org%2Fname%20x?y");
  EXPECT_EQ(match.route, Route::kModel);
  EXPECT_EQ(match.handler, "/v1/models/{id}");
  EXPECT_EQ(match.argument, "org/name x");
  EXPECT_EQ(match_route("GET", "/v1/models/org/name").argument, "org/name");
  EXPECT_EQ(percent_decode("%"), "%");
  EXPECT_EQ(percent_decode("%4"), "%4");
  EXPECT_EQ(percent_decode("%zz%41"), "%zzA");
}

TEST(HttpRouter, FindsTheRequestToCancel) {
  const RouteMatch match = match_route("POST", "/v1/spindle/requests/42/cancel");
  EXPECT_EQ(match.route, Route::kCancelRequest);
  EXPECT_EQ(match.handler, "/v1/spindle/requests/{id}/cancel");
  EXPECT_EQ(match.argument, "42");
  EXPECT_EQ(match_route("GET", "/v1/spindle/requests/42/cancel").route, Route::kMethodNotAllowed);
  for (const char* path : {"/v1/spindle/requests/", "/v1/spindle/requests/cancel",
                           "/v1/spindle/requests//cancel", "/v1/spindle/requests/42"}) {
    EXPECT_EQ(match_route("POST", path).route, Route::kNotFound) << path;
  }
}

TEST(HttpRouter, OpensWhatProbesAndTheDashboardNeedOnly) {
  const std::set<std::string> open{"/health",           "/live",    "/ready",
                                   "/version",          "/metrics", "/v1/spindle/state",
                                   "/v1/spindle/events"};
  for (const std::string path :
       {"/health", "/live", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/x",
        "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/spindle/state",
        "/v1/spindle/events", "/v1/spindle/drain", "/v1/spindle/log_level", "/v1/spindle/trace",
        "/v1/spindle/requests/1/cancel", "/nowhere"}) {
    for (const char* method : {"GET", "POST", "OPTIONS"}) {
      EXPECT_EQ(match_route(method, path).needs_key, !open.contains(path)) << path;
    }
  }
}

TEST(HttpRouter, GivesAllPagesOneLabel) {
  const RouteMatch match = match_page("GET", "/dashboard/app.js");
  EXPECT_EQ(match.route, Route::kPage);
  EXPECT_EQ(match.handler, "page");
  EXPECT_FALSE(match.needs_key);
  EXPECT_EQ(match_page("POST", "/dashboard/app.js").route, Route::kMethodNotAllowed);
}

TEST(HttpRouter, MakesDistinctRequestIds) {
  const std::string id = make_request_id();
  EXPECT_EQ(id.size(), 32u);
  EXPECT_EQ(sanitize_request_id(id), id);
  EXPECT_NE(make_request_id(), id);
  EXPECT_EQ(sanitize_request_id("a\r\nSet-Cookie: b"), "aSet-Cookie:b");
}

}  // namespace
}  // namespace spindle::api
