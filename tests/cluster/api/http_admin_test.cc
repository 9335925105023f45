#include "cluster/api/http_admin.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

#include "tests/cluster/api/api_test_server.h"
#include "tests/cluster/api/http_test_client.h"

namespace spindle::api {
namespace {

using testing::HasSubstr;

// A cluster whose recording lasts until `seconds` have passed, or it is stopped.
class FakeAdmin final : public ClusterAdmin {
 public:
  Status set_log_level(std::string_view level) override {
    if (level == "loud") return invalid_argument("the level must be debug or info");
    const std::lock_guard lock(mutex_);
    level_ = level;
    return ok_status();
  }

  Result<Pieces> trace(const TraceRequest& request, const std::stop_token& stop) override {
    if (under_way_.exchange(true)) return resource_exhausted("a recording is under way");
    std::mutex mutex;
    std::unique_lock lock(mutex);
    std::condition_variable_any nobody;
    nobody.wait_for(lock, stop, std::chrono::duration<double>(request.seconds),
                    [] { return false; });
    under_way_ = false;
    if (stop.stop_requested()) {
      ++n_stopped_;
      return cancelled("stopped");
    }
    return Pieces([left = 3, events = request.max_events](std::string& piece) mutable {
      piece = "[" + std::to_string(events) + "]";
      return left-- > 0;
    });
  }

  std::string level() {
    const std::lock_guard lock(mutex_);
    return level_;
  }
  bool under_way() const { return under_way_; }
  int n_stopped() const { return n_stopped_; }

 private:
  std::mutex mutex_;
  std::string level_;
  std::atomic<bool> under_way_{false};
  std::atomic<int> n_stopped_{0};
};

AdminAnswer ask(ClusterAdmin& admin, const std::string& path, const std::string& body) {
  HttpRequest request;
  request.match = match_route("POST", path);
  request.body = body;
  return administer(admin, request, {});
}

TEST(HttpAdmin, SetsTheLevelOfTheLog) {
  FakeAdmin admin;
  const AdminAnswer answer = ask(admin, "/v1/spindle/log_level", R"({"level":"debug"})");
  EXPECT_EQ(answer.response.status, 200);
  EXPECT_EQ(answer.response.body, R"({"level":"debug"})");
  EXPECT_EQ(admin.level(), "debug");
}

TEST(HttpAdmin, RefusesWhatItDoesNotUnderstand) {
  FakeAdmin admin;
  for (const std::string body : {"", "{}", "[]", "{", R"({"level":7})", R"({"level":"loud"})",
                                 R"({"levels":"debug"})", R"({"level":"debug","rank":1})"}) {
    const AdminAnswer answer = ask(admin, "/v1/spindle/log_level", body);
    EXPECT_EQ(answer.response.status, 400) << body;
  }
  for (const std::string body :
       {R"({"seconds":0})", R"({"seconds":-1})", R"({"seconds":60.1})", R"({"seconds":"5"})",
        R"({"seconds":1e400})", R"({"second":1})", R"({"seconds":0.01,"max_events":15})",
        R"({"seconds":0.01,"max_events":1048577})", R"({"max_events":1.5})"}) {
    const AdminAnswer answer = ask(admin, "/v1/spindle/trace", body);
    EXPECT_EQ(answer.response.status, 400) << body;
    EXPECT_FALSE(answer.pieces) << body;
  }
  EXPECT_EQ(admin.level(), "");
}

class HttpAdminServer : public testing::Test {
 protected:
  static ApiTestOptions options(ClusterAdmin* admin, std::vector<std::string> keys = {}) {
    ApiTestOptions out;
    out.admin = admin;
    out.api_keys = std::move(keys);
    return out;
  }
  void wait_for(const std::function<bool()>& condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!condition()) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  FakeAdmin admin_;
};

TEST_F(HttpAdminServer, StreamsTheTraceAndKeepsTheConnection) {
  ApiTestServer server(options(&admin_));
  HttpTestClient client(server.port());
  const TestResponse trace =
      client.post("/v1/spindle/trace", R"({"seconds":0.02,"max_events":99})");
  EXPECT_EQ(trace.status, 200);
  EXPECT_EQ(trace.headers.at("content-type"), "application/json");
  EXPECT_EQ(trace.headers.at("transfer-encoding"), "chunked");
  EXPECT_EQ(trace.body, "[99][99][99]");
  EXPECT_EQ(client.post("/v1/spindle/log_level", R"({"level":"info"})").status, 200);
  EXPECT_THAT(client.get("/metrics").body, HasSubstr("handler=\"/v1/spindle/trace\""));
}

TEST_F(HttpAdminServer, AnswersOthersWhileItRecordsAndRefusesASecondRecording) {
  ApiTestServer server(options(&admin_));
  HttpTestClient first(server.port());
  ASSERT_TRUE(first.send(post_text("/v1/spindle/trace", R"({"seconds":60})")));
  wait_for([this] { return admin_.under_way(); });
  HttpTestClient second(server.port());
  const TestResponse refused = second.post("/v1/spindle/trace", R"({"seconds":1})");
  EXPECT_EQ(refused.status, 409);
  EXPECT_EQ(refused.error("code"), "trace_under_way");
  EXPECT_EQ(second.get("/health").status, 200);
  EXPECT_EQ(second.post("/v1/spindle/log_level", R"({"level":"info"})").status, 200);
  // A client that leaves takes its recording with it.
  first.close();
  wait_for([this] { return admin_.n_stopped() == 1; });
  EXPECT_EQ(second.post("/v1/spindle/trace", R"({"seconds":0.01})").status, 200);
}

TEST_F(HttpAdminServer, AStoppedServerStopsTheRecording) {
  {
    ApiTestServer server(options(&admin_));
    HttpTestClient client(server.port());
    ASSERT_TRUE(client.send(post_text("/v1/spindle/trace", R"({"seconds":60})")));
    wait_for([this] { return admin_.under_way(); });
  }
  EXPECT_EQ(admin_.n_stopped(), 1);
}

TEST_F(HttpAdminServer, NeedsTheKey) {
  ApiTestServer server(options(&admin_, {"secret"}));
  HttpTestClient client(server.port());
  for (const char* path : {"/v1/spindle/trace", "/v1/spindle/log_level"}) {
    EXPECT_EQ(client.post(path, R"({"level":"debug"})").status, 401) << path;
    EXPECT_EQ(client.post(path, R"({"level":"debug"})", "Authorization: Bearer wrong\r\n").status,
              401);
  }
  EXPECT_EQ(admin_.level(), "");
  EXPECT_EQ(
      client
          .post("/v1/spindle/log_level", R"({"level":"debug"})", "Authorization: Bearer secret\r\n")
          .status,
      200);
  EXPECT_EQ(admin_.level(), "debug");
}

TEST_F(HttpAdminServer, WithoutAClusterOrdersAreRefused) {
  ApiTestServer server(options(nullptr));
  HttpTestClient client(server.port());
  EXPECT_EQ(client.post("/v1/spindle/trace", "{}").status, 400);
  EXPECT_EQ(client.get("/v1/spindle/trace").status, 405);
}

}  // namespace
}  // namespace spindle::api
