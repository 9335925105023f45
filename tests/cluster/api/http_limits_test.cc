// What the HTTP server does with requests it must not serve.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/cluster/api/api_test_server.h"
#include "tests/cluster/api/http_test_client.h"

namespace spindle::api {
namespace {

using ::testing::HasSubstr;

TEST(HttpLimits, ExplainsEveryBadBody) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  struct Case {
    std::string body;
    int status;
    std::string param;
    std::string code;
  };
  const std::string chat = R"("messages":[{"role":"user","content":"x"}])";
  const std::vector<Case> cases{
      {"", 400, "", "invalid_value"},
      {"{", 400, "", "invalid_value"},
      {"[]", 400, "", "invalid_value"},
      {"\"x\"", 400, "", "invalid_value"},
      {"{\"prompt\":\"\xff\"}", 400, "", "invalid_value"},
      {R"({"prompt":"a","temperature":1e999})", 400, "", "invalid_value"},
      {R"({"prompt":)" + std::string(100000, '[') + "}", 400, "", "invalid_value"},
      {"{}", 400, "prompt", "invalid_value"},
      {R"({"prompt":""})", 400, "prompt", "invalid_value"},
      {R"({"prompt":[]})", 400, "prompt", "invalid_value"},
      {R"({"prompt":["a",""]})", 400, "prompt", "invalid_value"},
      {R"({"prompt":"a","model":"gpt-4"})", 404, "model", "model_not_found"},
      {R"({"prompt":"a","model":7})", 400, "model", "invalid_type"},
      {R"({"prompt":"a","temperature":3})", 400, "temperature", "invalid_value"},
      {R"({"prompt":"a","top_p":0})", 400, "top_p", "invalid_value"},
      {R"({"prompt":"a","n":17})", 400, "n", "invalid_value"},
      {R"({"prompt":"a","n":1e9})", 400, "n", "invalid_value"},
      {R"({"prompt":"a","logprobs":21})", 400, "logprobs", "invalid_value"},
      {R"({"prompt":"a","max_tokens":0})", 400, "max_tokens", "invalid_value"},
      {R"({"prompt":"a","max_tokens":512})", 400, "max_tokens", "context_length_exceeded"},
      {R"({"prompt":"a","stop":["a",""]})", 400, "stop", "invalid_value"},
      {R"({"prompt":"a","suffix":"b"})", 400, "suffix", "unsupported_parameter"},
      {R"({"prompt":[999999]})", 400, "prompt", "invalid_value"},
      {R"({"prompt":")" + std::string(4000, 'x') + R"( y"})", 400, "prompt",
       "context_length_exceeded"},
      {"{" + chat + "}", 400, "prompt", "invalid_value"},
  };
  for (const Case& c : cases) {
    const TestResponse response = client.post("/v1/completions", c.body);
    EXPECT_EQ(response.status, c.status) << c.body.substr(0, 80) << response.body;
    EXPECT_EQ(response.error("param"), c.param) << c.body.substr(0, 80) << response.body;
    EXPECT_EQ(response.error("code"), c.code) << c.body.substr(0, 80);
    EXPECT_NE(response.error("message"), "") << c.body.substr(0, 80);
  }
  EXPECT_TRUE(server.engine().submitted().empty());
  EXPECT_EQ(client.post("/v1/completions", R"({"prompt":"a","max_tokens":511})").status, 200);
}

TEST(HttpLimits, RefusesStreamsBeforeTheyBegin) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const TestResponse response =
      client.post("/v1/completions", R"({"prompt":"a","stream":true,"max_tokens":9999})");
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(response.headers.at("content-type"), "application/json");
}

TEST(HttpLimits, TakesAPromptOfExactlyTheContextLessOne) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const auto prompt_of = [](std::size_t n) {
    std::string ids = "5";
    for (std::size_t i = 1; i < n; ++i) ids += ",5";
    return R"({"prompt":[)" + ids + R"(],"max_tokens":1})";
  };
  EXPECT_EQ(client.post("/v1/completions", prompt_of(511)).status, 200);
  const TestResponse over = client.post("/v1/completions", prompt_of(512));
  EXPECT_EQ(over.status, 400);
  EXPECT_EQ(over.error("code"), "context_length_exceeded");
}

TEST(HttpLimits, AnswersServiceUnavailableWhenTheQueueIsFull) {
  ApiTestServer server;
  server.engine().set_capacity(0);
  HttpTestClient client(server.port());
  const TestResponse response = client.post("/v1/completions", R"({"prompt":"a"})");
  EXPECT_EQ(response.status, 503);
  EXPECT_EQ(response.error("code"), "server_is_overloaded");
  EXPECT_EQ(response.error("type"), "service_unavailable_error");
  EXPECT_EQ(response.headers.at("retry-after"), "1");
  EXPECT_EQ(client.get("/ready").status, 200);
  EXPECT_THAT(client.get("/metrics").body,
              HasSubstr("spindle_requests_refused_total{model_name=\"spindle-mini\","
                        "reason=\"queue_full\"} 1"));
}

TEST(HttpLimits, FailsAllPromptsWhenOneIsRefused) {
  ApiTestServer server;
  server.engine().set_capacity(1);
  HttpTestClient client(server.port());
  const TestResponse response =
      client.post("/v1/completions", R"({"prompt":["a","b"],"max_tokens":500,"ignore_eos":true})");
  // Whether the first prompt has ended when the second comes is a matter of luck.
  EXPECT_TRUE(response.status == 503 || response.status == 200) << response.status;
  EXPECT_TRUE(
      server.engine().wait_for([](const engine::EngineStats& stats) { return stats.running == 0; },
                               Deadline::after_ms(10000)));
}

TEST(HttpLimits, HoldsTheBodyLimitToTheByte) {
  ApiTestOptions options;
  options.limits.set_max_body_bytes(1000);
  ApiTestServer server(options);
  const auto body_of = [](std::size_t bytes) {
    std::string body = R"({"prompt":"a","user":")";
    body += std::string(bytes - body.size() - 2, 'u');
    return body + "\"}";
  };
  HttpTestClient fits(server.port());
  EXPECT_EQ(fits.post("/v1/completions", body_of(1000)).status, 200);
  const TestResponse over = fits.post("/v1/completions", body_of(1001));
  EXPECT_EQ(over.status, 413);
  EXPECT_EQ(over.error("code"), "request_too_large");
  EXPECT_EQ(over.headers.at("connection"), "close");
  EXPECT_TRUE(fits.closed_by_server());

  const auto chunked = [](const std::string& body) {
    return "POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n" +
           body.substr(0, 1000) + "\r\n" +
           (body.size() > 1000 ? "1\r\n" + body.substr(1000) + "\r\n" : "") + "0\r\n\r\n";
  };
  HttpTestClient chunks(server.port());
  chunks.send(chunked(body_of(1000)));
  EXPECT_EQ(chunks.receive().status, 200);
  chunks.send(chunked(body_of(1001)));
  EXPECT_EQ(chunks.receive().status, 413);
}

TEST(HttpLimits, RefusesAHeaderFlood) {
  ApiTestServer server;
  HttpTestClient one_line(server.port());
  one_line.send("GET /live HTTP/1.1\r\nHost: t\r\nX-Fill: " + std::string(20000, 'x') + "\r\n\r\n");
  const TestResponse response = one_line.receive();
  EXPECT_EQ(response.status, 431);
  EXPECT_EQ(response.error("code"), "header_too_large");
  EXPECT_TRUE(one_line.closed_by_server());
  HttpTestClient many(server.port());
  std::string headers;
  for (int i = 0; i < 2000; ++i) headers += "X-" + std::to_string(i) + ": y\r\n";
  EXPECT_EQ(many.get("/live", headers).status, 431);
  HttpTestClient fits(server.port());
  EXPECT_EQ(fits.get("/live", "X-Fill: " + std::string(15000, 'x') + "\r\n").status, 200);
}

TEST(HttpLimits, RefusesWhatIsNotHttp) {
  ApiTestServer server;
  for (const std::string& bytes : std::vector<std::string>{
           "hello\r\n\r\n",
           "GET /live HTTP/2.0\r\n\r\n",
           "GET\r\n\r\n",
           std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 15),
           "POST /tokenize HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
           "POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
           "POST /tokenize HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ",
           "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
           "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
       }) {
    HttpTestClient client(server.port());
    client.send(bytes);
    const TestResponse response = client.receive();
    EXPECT_THAT(response.status, ::testing::AnyOf(400, 413)) << bytes;
    EXPECT_TRUE(client.closed_by_server()) << bytes;
  }
  HttpTestClient client(server.port());
  EXPECT_EQ(client.get("/live").status, 200);
}

TEST(HttpLimits, TimesOutHalfARequest) {
  ApiTestOptions options;
  options.limits.set_read_timeout_ms(200);
  ApiTestServer server(options);
  for (const char* half : {"GET /live HT", "POST /tokenize HTTP/1.1\r\nHost: t\r\n",
                           "POST /tokenize HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"pro"}) {
    HttpTestClient client(server.port());
    client.send(half);
    const TestResponse response = client.receive();
    EXPECT_EQ(response.status, 408) << half;
    EXPECT_EQ(response.error("code"), "request_timeout");
    EXPECT_EQ(response.headers.at("connection"), "close");
    EXPECT_TRUE(client.closed_by_server());
  }
}

TEST(HttpLimits, TimesOutATrickleToo) {
  ApiTestOptions options;
  options.limits.set_read_timeout_ms(300);
  ApiTestServer server(options);
  HttpTestClient client(server.port());
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) {
    if (!client.send(i == 0 ? "GET /live HTTP/1.1\r\n" : "X: y\r\n")) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(1)) break;
  }
  EXPECT_EQ(client.receive().status, 408);
}

TEST(HttpLimits, ClosesIdleConnectionsWithoutAWord) {
  ApiTestOptions options;
  options.limits.set_idle_timeout_ms(200);
  ApiTestServer server(options);
  HttpTestClient fresh(server.port());
  EXPECT_EQ(fresh.read_some(), "");
  HttpTestClient used(server.port());
  EXPECT_EQ(used.get("/live").status, 200);
  EXPECT_EQ(used.read_some(), "");
}

TEST(HttpLimits, TurnsAwayConnectionsOverTheLimit) {
  ApiTestOptions options;
  options.limits.set_max_connections(2);
  ApiTestServer server(options);
  HttpTestClient first(server.port());
  auto second = std::make_unique<HttpTestClient>(server.port());
  EXPECT_EQ(first.get("/live").status, 200);
  EXPECT_EQ(second->get("/live").status, 200);
  HttpTestClient third(server.port());
  const TestResponse response = third.receive();
  EXPECT_EQ(response.status, 503);
  EXPECT_EQ(response.error("code"), "server_is_overloaded");
  EXPECT_EQ(response.headers.at("retry-after"), "1");
  EXPECT_TRUE(third.closed_by_server());
  EXPECT_EQ(first.get("/live").status, 200);
  second.reset();
  third.close();
  // The server learns of the closed sockets a moment later.
  int status = 0;
  for (int i = 0; i < 100 && status != 200; ++i) {
    HttpTestClient next(server.port());
    status = next.get("/live").status;
    if (status != 200) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_EQ(status, 200);
}

TEST(HttpLimits, DeniesEverythingButTheOpenPathsWithoutAKey) {
  ApiTestOptions options;
  options.api_keys = {"sk-one", "sk-two"};
  ApiTestServer server(options);
  HttpTestClient client(server.port());
  for (const char* path :
       {"/health", "/live", "/ready", "/version", "/metrics", "/page", "/v1/spindle/state"}) {
    EXPECT_EQ(client.get(path).status, 200) << path;
  }
  const std::vector<std::pair<std::string, std::string>> closed{
      {"POST", "/v1/completions"},   {"POST", "/v1/chat/completions"},
      {"GET", "/v1/models"},         {"GET", "/v1/models/x"},
      {"POST", "/tokenize"},         {"POST", "/detokenize"},
      {"POST", "/v1/spindle/drain"}, {"POST", "/v1/spindle/requests/1/cancel"},
      {"GET", "/nowhere"},           {"DELETE", "/v1/completions"},
      {"OPTIONS", "/v1/models"}};
  for (const auto& [method, path] : closed) {
    for (const std::string header :
         {"", "Authorization: Bearer sk-wrong\r\n", "Authorization: Basic sk-one\r\n",
          "Authorization: Bearer\r\n", "Authorization: Bearer sk-on\r\n"}) {
      client.send(method + " " + path + " HTTP/1.1\r\nHost: t\r\n" + header +
                  "Content-Length: 2\r\n\r\n{}");
      const TestResponse response = client.receive();
      EXPECT_EQ(response.status, 401) << method << " " << path << " " << header;
      EXPECT_EQ(response.error("code"), "invalid_api_key");
      EXPECT_EQ(response.error("type"), "authentication_error");
      EXPECT_EQ(response.headers.at("www-authenticate"), "Bearer");
    }
  }
  EXPECT_EQ(server.n_drains(), 0);
  for (const std::string key : {"sk-one", "sk-two"}) {
    EXPECT_EQ(client.get("/v1/models", "Authorization: Bearer " + key + "\r\n").status, 200);
  }
  EXPECT_EQ(client.post("/v1/spindle/drain", "", "Authorization: Bearer sk-one\r\n").status, 202);
}

TEST(HttpLimits, AnswersRefusalsWithoutReadingLargeBodies) {
  ApiTestOptions options;
  options.api_keys = {"sk"};
  ApiTestServer server(options);
  HttpTestClient client(server.port());
  // The body never comes; neither does a time-out.
  client.send("POST /v1/completions HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n");
  const TestResponse response = client.receive();
  EXPECT_EQ(response.status, 401);
  EXPECT_EQ(response.headers.at("connection"), "close");
}

TEST(HttpLimits, ContinuesOnlyRequestsItWillRead) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const std::string body = R"({"prompt":"a"})";
  const std::string expect =
      "Expect: 100-continue\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n";
  client.send("POST /tokenize HTTP/1.1\r\n" + expect);
  EXPECT_THAT(client.read_some(), HasSubstr("100 Continue"));
  client.send(body);
  EXPECT_EQ(client.receive().status, 200);
  client.send("POST /nowhere HTTP/1.1\r\n" + expect);
  EXPECT_EQ(client.receive().status, 404);
}

TEST(HttpLimits, TakesJsonOnly) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const std::string body = R"({"prompt":"a"})";
  const auto post_as = [&](const std::string& type) {
    client.send("POST /v1/completions HTTP/1.1\r\nHost: t\r\n" + type +
                "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
    return client.receive();
  };
  EXPECT_EQ(post_as("").status, 200);
  EXPECT_EQ(post_as("Content-Type: Application/JSON; charset=utf-8\r\n").status, 200);
  for (const char* type : {"text/plain", "application/x-www-form-urlencoded", "application/jsonx",
                           "multipart/form-data; boundary=x"}) {
    const TestResponse response = post_as("Content-Type: " + std::string(type) + "\r\n");
    EXPECT_EQ(response.status, 415) << type;
    EXPECT_EQ(response.error("code"), "unsupported_media_type");
  }
}

}  // namespace
}  // namespace spindle::api
