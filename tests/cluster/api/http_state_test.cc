// /v1/spindle/state and the cancelling of requests, over a socket.

#include <gtest/gtest.h>

#include <string>

#include "tests/cluster/api/api_test_server.h"
#include "tests/cluster/api/http_test_client.h"
#include "tests/cluster/telemetry/exposition.h"

namespace spindle::api {
namespace {

namespace json = boost::json;

constexpr const char* kEndless =
    R"({"prompt":"a","max_tokens":400,"ignore_eos":true,"stream":true,"priority":3})";

ApiTestOptions slow_options() {
  ApiTestOptions options;
  options.token_delay = std::chrono::milliseconds(20);
  return options;
}

int first_tokens(const json::value& state) {
  const json::value& latency = state.at("latency").at("time_to_first_token_seconds");
  return latency.at("counts").as_array().back().to_number<int>();
}

// The state once a request runs and has output, and its first token is counted, which is after
// that.
json::value state_with_a_request(HttpTestClient& client) {
  const Deadline deadline = Deadline::after_ms(10000);
  while (!deadline.passed()) {
    json::value state = client.get("/v1/spindle/state").json();
    const json::array& active = state.at("active_requests").as_array();
    if (!active.empty() && active[0].at("generated_tokens").as_int64() > 0 &&
        first_tokens(state) > 0) {
      return state;
    }
  }
  ADD_FAILURE() << "no request came to run";
  return {};
}

TEST(HttpState, ShowsTheRequestsUnderWay) {
  ApiTestServer server(slow_options());
  HttpTestClient generating(server.port());
  HttpTestClient client(server.port());
  generating.send(post_text("/v1/completions", kEndless));
  const json::value state = state_with_a_request(client);
  EXPECT_EQ(state.at("active_requests_total").as_int64(), 1);
  const json::value& request = state.at("active_requests").as_array().at(0);
  EXPECT_EQ(request.at("state").as_string(), "running");
  EXPECT_EQ(request.at("priority").as_int64(), 3);
  EXPECT_EQ(request.at("prompt_tokens").as_int64(), 1);
  EXPECT_EQ(request.at("max_tokens").as_int64(), 400);
  EXPECT_EQ(request.at("policy").as_string(), "full");
  EXPECT_EQ(state.at("version").as_string(), "1.2.3");
  EXPECT_GT(state.at("unix_ms").as_int64(), 1600000000000);
  const json::value& latency = state.at("latency").at("time_to_first_token_seconds");
  EXPECT_EQ(latency.at("counts").as_array().size(), latency.at("bounds").as_array().size() + 1);
  EXPECT_EQ(first_tokens(state), 1);
}

TEST(HttpState, MetricsSayWhatARequestWas) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const std::string body = R"({"prompt":"a","max_tokens":5,"n":2})";
  const TestResponse response = client.post("/v1/completions", body);
  ASSERT_EQ(response.status, 200);
  // On the same connection the next answer comes after the last one is counted.
  const auto families = telemetry::testing::parse_exposition(client.get("/metrics").body);
  const auto value = [&](const std::string& name, const std::string& sample) {
    return families.at("spindle_" + name).samples.at(sample);
  };
  const std::string model = "{model_name=\"spindle-mini\"}";
  EXPECT_EQ(value("request_params_n", "_sum" + model), 2);
  EXPECT_EQ(value("request_params_max_tokens", "_sum" + model), 5);
  EXPECT_EQ(value("request_generation_tokens", "_sum" + model), 10);
  EXPECT_EQ(value("request_max_num_generation_tokens", "_sum" + model), 5);
  EXPECT_EQ(value("request_decode_time_seconds", "_count" + model), 1);
  EXPECT_GE(value("request_inference_time_seconds", "_sum" + model),
            value("request_decode_time_seconds", "_sum" + model));
  const std::string handler = "{handler=\"/v1/completions\"}";
  EXPECT_EQ(value("http_request_duration_seconds", "_count" + handler), 1);
  EXPECT_EQ(value("http_request_size_bytes", "_sum" + handler), static_cast<double>(body.size()));
  EXPECT_GT(value("http_response_size_bytes", "_sum" + handler),
            static_cast<double>(response.body.size()));
}

TEST(HttpState, CancelsARequest) {
  ApiTestServer server(slow_options());
  HttpTestClient generating(server.port());
  HttpTestClient client(server.port());
  generating.send(post_text("/v1/completions", kEndless));
  const json::value state = state_with_a_request(client);
  const std::string id(state.at("active_requests").as_array().at(0).at("id").as_string());
  const std::string path = "/v1/spindle/requests/" + id + "/cancel";
  const TestResponse cancelled = client.post(path, "");
  EXPECT_EQ(cancelled.status, 202);
  EXPECT_EQ(cancelled.body, R"({"cancelled":true})");
  // The client that waits for the output is told.
  const TestResponse ended = generating.receive();
  EXPECT_EQ(ended.status, 200);
  EXPECT_NE(ended.body.find("cancelled"), std::string::npos) << ended.body;
  EXPECT_TRUE(server.engine().wait_for(
      [](const engine::EngineStats& stats) { return stats.cancelled == 1; },
      Deadline::after_ms(10000)));
  const TestResponse again = client.post(path, "");
  EXPECT_EQ(again.status, 404);
  EXPECT_EQ(again.error("code"), "not_found");
}

TEST(HttpState, CancelsNothingThatIsNoRequest) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  for (const char* id : {"0", "1", "-1", "x", "1x", "%31%00", "99999999999999999999", "1%2F2"}) {
    const TestResponse response =
        client.post("/v1/spindle/requests/" + std::string(id) + "/cancel", "");
    EXPECT_EQ(response.status, 404) << id;
  }
}

TEST(HttpState, CancellingNeedsTheKey) {
  ApiTestOptions options = slow_options();
  options.api_keys = {"sk-one"};
  ApiTestServer server(options);
  HttpTestClient generating(server.port());
  HttpTestClient client(server.port());
  const std::string key = "Authorization: Bearer sk-one\r\n";
  generating.send(post_text("/v1/completions", kEndless, key));
  // The state itself is as open as the metrics.
  const json::value state = state_with_a_request(client);
  const std::string id(state.at("active_requests").as_array().at(0).at("id").as_string());
  const std::string path = "/v1/spindle/requests/" + id + "/cancel";
  EXPECT_EQ(client.post(path, "").status, 401);
  EXPECT_EQ(client.post(path, "", "Authorization: Bearer sk-two\r\n").status, 401);
  EXPECT_EQ(server.engine().stats().cancelled, 0u);
  EXPECT_EQ(client.post(path, "", key).status, 202);
}

}  // namespace
}  // namespace spindle::api
