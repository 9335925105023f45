// Streams whose client or server does not wait for the end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>

#include "tests/cluster/api/api_test_server.h"
#include "tests/cluster/api/http_test_client.h"

namespace spindle::api {
namespace {

namespace json = boost::json;
using std::chrono::milliseconds;
using ::testing::HasSubstr;

constexpr const char* kEndlessStream =
    R"({"prompt":"a","stream":true,"ignore_eos":true,"max_tokens":900000})";

ApiTestOptions endless(std::chrono::microseconds token_delay,
                       std::chrono::microseconds first_delay = {}) {
  ApiTestOptions options;
  options.max_model_len = 1000000;
  options.script_for = [=](const engine::EngineRequest&) {
    return FakeScript{
        .tokens = {300, 301, 302, 303},
        .first_delay = first_delay,
        .token_delay = token_delay,
        .failure = {},
    };
  };
  return options;
}

bool wait_cancelled(ApiTestServer& server, std::uint64_t n) {
  return server.engine().wait_for(
      [n](const engine::EngineStats& stats) { return stats.cancelled == n; },
      Deadline::after_ms(10000));
}

bool wait_running(ApiTestServer& server, std::int32_t n) {
  return server.engine().wait_for(
      [n](const engine::EngineStats& stats) { return stats.running == n; },
      Deadline::after_ms(10000));
}

TEST(HttpStream, CancelsWhenTheClientGoes) {
  ApiTestServer server(endless(milliseconds(1)));
  HttpTestClient client(server.port());
  client.send(post_text("/v1/completions", kEndlessStream));
  ASSERT_THAT(client.read_some(), HasSubstr("200 OK"));
  client.close();
  EXPECT_TRUE(wait_cancelled(server, 1));
  EXPECT_TRUE(wait_running(server, 0));
}

TEST(HttpStream, CancelsWhenTheClientGoesBeforeTheFirstToken) {
  // The first token would come after a minute.
  for (const bool stream : {true, false}) {
    ApiTestServer server(endless(milliseconds(1), std::chrono::minutes(1)));
    HttpTestClient client(server.port());
    client.send(post_text("/v1/completions",
                          std::string(R"({"prompt":["a","b"],"max_tokens":9,"stream":)") +
                              (stream ? "true}" : "false}")));
    ASSERT_TRUE(wait_running(server, 2));
    client.close();
    EXPECT_TRUE(wait_cancelled(server, 2));
  }
}

TEST(HttpStream, CancelsForASlowReader) {
  ApiTestOptions options = endless(std::chrono::microseconds(20));
  options.limits.set_max_buffered_bytes(4096);
  options.limits.set_write_timeout_ms(300);
  ApiTestServer server(options);
  HttpTestClient client(server.port(), /*receive_buffer_bytes=*/4096);
  client.send(post_text("/v1/completions", kEndlessStream));
  EXPECT_TRUE(wait_cancelled(server, 1));
  // Far fewer tokens than asked for: the buffers were small.
  EXPECT_LT(server.engine().stats().generation_tokens, 200000u);
}

TEST(HttpStream, CancelsForAReaderThatStalls) {
  // Slow tokens: the merged output never overflows, the socket just takes nothing.
  ApiTestOptions options = endless(std::chrono::microseconds(200));
  options.limits.set_write_timeout_ms(300);
  options.limits.set_max_buffered_bytes(1 << 20);
  options.script_for = [](const engine::EngineRequest&) {
    return FakeScript{.tokens = std::vector<std::int32_t>(1, 300),
                      .token_delay = std::chrono::microseconds(50),
                      .failure = {}};
  };
  ApiTestServer server(options);
  HttpTestClient client(server.port(), 4096);
  client.send(post_text(
      "/v1/completions",
      R"({"prompt":"a","stream":true,"ignore_eos":true,"max_tokens":900000,"logprobs":20})"));
  EXPECT_TRUE(wait_cancelled(server, 1));
}

TEST(HttpStream, EndsAFailedStreamWithAnError) {
  ApiTestOptions options;
  options.script_for = [](const engine::EngineRequest&) {
    return FakeScript{
        .tokens = {300, 301, 302}, .fail_after = 2, .failure = unavailable("a stage is gone")};
  };
  ApiTestServer server(options);
  HttpTestClient client(server.port());
  const TestResponse response = client.post("/v1/completions", R"({"prompt":"a","stream":true})");
  EXPECT_EQ(response.status, 200);
  const auto events = response.events();
  ASSERT_GE(events.size(), 3u);
  EXPECT_EQ(events.back(), "[DONE]");
  const json::value error = json::parse(events[events.size() - 2]);
  EXPECT_EQ(error.at_pointer("/error/message").as_string(), "a stage is gone");
  EXPECT_EQ(error.at_pointer("/error/type").as_string(), "service_unavailable_error");
  EXPECT_EQ(client.get("/live").status, 200);
  // Not streamed, the same failure is a status.
  EXPECT_EQ(client.post("/v1/completions", R"({"prompt":"a"})").status, 503);
}

TEST(HttpStream, PingsWhileThereIsNoOutput) {
  ApiTestOptions options = endless(milliseconds(1), milliseconds(450));
  options.ping_interval_ms = 100;
  ApiTestServer server(options);
  HttpTestClient client(server.port());
  const TestResponse response =
      client.post("/v1/completions", R"({"prompt":"a","stream":true,"max_tokens":2})");
  EXPECT_TRUE(response.body.starts_with(": ping\n\n: ping\n\n")) << response.body.substr(0, 40);
  EXPECT_EQ(response.events().back(), "[DONE]");
}

TEST(HttpStream, AnswersTheNextRequestAfterAStream) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  client.send(post_text("/v1/completions", R"({"prompt":"a","stream":true})") +
              post_text("/v1/completions", R"({"prompt":"b"})"));
  EXPECT_EQ(client.receive().events().back(), "[DONE]");
  EXPECT_EQ(client.receive().status, 200);
}

TEST(HttpStream, BoundsWhatAPipeliningClientMaySend) {
  ApiTestServer server(endless(milliseconds(1)));
  HttpTestClient client(server.port());
  client.set_timeout(milliseconds(500));
  client.send(post_text("/v1/completions", kEndlessStream));
  ASSERT_THAT(client.read_some(), HasSubstr("200 OK"));
  // The server stops reading at some point, and the sockets' buffers fill.
  const std::string megabyte(1 << 20, 'x');
  bool sent = true;
  for (int i = 0; i < 64 && sent; ++i) sent = client.send(megabyte);
  EXPECT_FALSE(sent);
  client.close();
  EXPECT_TRUE(wait_cancelled(server, 1));
}

TEST(HttpStream, StopsGently) {
  ApiTestOptions options;
  options.script_for = [](const engine::EngineRequest& request) {
    return FakeScript{.tokens = request.prompt_ids, .token_delay = milliseconds(20), .failure = {}};
  };
  ApiTestServer server(options);
  HttpTestClient idle(server.port());
  EXPECT_EQ(idle.get("/live").status, 200);
  HttpTestClient busy(server.port());
  busy.send(
      post_text("/v1/completions", R"({"prompt":"a b c d","stream":true,"ignore_eos":true})"));
  ASSERT_TRUE(wait_running(server, 1));
  server.server().stop_gently();
  EXPECT_TRUE(idle.closed_by_server());
  EXPECT_EQ(busy.receive().events().back(), "[DONE]");
  EXPECT_TRUE(busy.closed_by_server());
  busy.close();
  EXPECT_TRUE(server.server().wait_stopped(Deadline::after_ms(10000)));
  EXPECT_EQ(server.engine().stats().finished, 1u);
  EXPECT_EQ(server.server().n_connections(), 0u);
}

TEST(HttpStream, StopsAtOnce) {
  ApiTestServer server(endless(milliseconds(1)));
  HttpTestClient busy(server.port());
  busy.send(post_text("/v1/completions", kEndlessStream));
  ASSERT_TRUE(wait_running(server, 1));
  server.server().stop_now();
  EXPECT_TRUE(server.server().wait_stopped(Deadline::after_ms(5000)));
  EXPECT_TRUE(wait_cancelled(server, 1));
  EXPECT_TRUE(busy.closed_by_server());
}

TEST(HttpStream, SurvivesClientsThatComeAndGo) {
  ApiTestServer server(endless(milliseconds(1)));
  for (int round = 0; round < 20; ++round) {
    HttpTestClient early(server.port());
    early.send(post_text("/v1/completions", kEndlessStream).substr(0, 20u + 10u * round));
    HttpTestClient late(server.port());
    late.send(post_text("/v1/completions", kEndlessStream));
    if (round % 2 == 0) late.read_some();
  }
  EXPECT_TRUE(server.engine().wait_for(
      [](const engine::EngineStats& stats) {
        return stats.running == 0 && stats.accepted == stats.cancelled && stats.accepted >= 10;
      },
      Deadline::after_ms(10000)));
}

}  // namespace
}  // namespace spindle::api
