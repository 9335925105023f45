#include "cluster/api/http_pages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace spindle::api {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Pair;

HttpPages some_pages() {
  return HttpPages({{"/a", {.content_type = "text/html; charset=utf-8", .body = "one"}},
                    {"/b.js", {.content_type = "text/javascript", .body = "two"}},
                    {"/a/", {.content_type = "text/plain", .redirect = "../a"}}});
}

std::string header(const HttpResponse& response, const std::string& wanted) {
  for (const auto& [name, value] : response.headers) {
    if (name == wanted) return value;
  }
  return "(none)";
}

TEST(HttpPages, GivesAPageWithItsProtection) {
  const HttpPages pages = some_pages();
  EXPECT_EQ(pages.find("/a"), "/a");
  const HttpResponse response = pages.respond("/a", "");
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.content_type, "text/html; charset=utf-8");
  EXPECT_EQ(response.body, "one");
  const std::string policy = header(response, "Content-Security-Policy");
  EXPECT_THAT(policy, HasSubstr("default-src 'none'"));
  EXPECT_THAT(policy, HasSubstr("frame-ancestors 'none'"));
  EXPECT_THAT(policy, ::testing::Not(HasSubstr("unsafe")));
  EXPECT_THAT(response.headers, Contains(Pair("X-Content-Type-Options", "nosniff")));
  EXPECT_THAT(response.headers, Contains(Pair("Cache-Control", "no-cache")));
}

TEST(HttpPages, DoesNotSendAnUnchangedPageAgain) {
  const HttpPages pages = some_pages();
  const std::string tag = header(pages.respond("/a", ""), "ETag");
  EXPECT_NE(tag, header(pages.respond("/b.js", ""), "ETag"));
  const HttpResponse same = pages.respond("/a", tag);
  EXPECT_EQ(same.status, 304);
  EXPECT_EQ(same.body, "");
  EXPECT_EQ(header(same, "ETag"), tag);
  EXPECT_EQ(pages.respond("/b.js", tag).status, 200);
}

TEST(HttpPages, ReadsIfNoneMatch) {
  for (const char* text : {"\"x\"", "W/\"x\"", "*", "\"y\", \"x\"", " \"y\" ,W/\"x\" "}) {
    EXPECT_TRUE(matches_tag(text, "\"x\"")) << text;
  }
  for (const char* text : {"", "\"y\"", "x", ",", ",,", " ", "W/", "\"x"}) {
    EXPECT_FALSE(matches_tag(text, "\"x\"")) << text;
  }
}

TEST(HttpPages, SendsElsewhereAndKnowsNothingElse) {
  const HttpPages pages = some_pages();
  const HttpResponse moved = pages.respond("/a/", "");
  EXPECT_EQ(moved.status, 308);
  EXPECT_EQ(header(moved, "Location"), "../a");
  for (const char* path : {"", "/", "/A", "/a/b", "/../a", "/b.js/"}) {
    EXPECT_EQ(pages.find(path), "") << path;
    EXPECT_EQ(pages.respond(path, "").status, 404) << path;
  }
}

}  // namespace
}  // namespace spindle::api
