// End to end over a socket: what an OpenAI client sees.
#include "cluster/api/http_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "tests/cluster/api/api_test_server.h"
#include "tests/cluster/api/http_test_client.h"

namespace spindle::api {
namespace {

namespace json = boost::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string text_of(const json::value& value, const std::string& pointer) {
  boost::system::error_code error;
  const json::value* found = value.find_pointer(pointer, error);
  if (found == nullptr) return "(missing)";
  return found->is_string() ? std::string(found->get_string()) : json::serialize(*found);
}

TEST(HttpServer, CompletesAPrompt) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const TestResponse response = client.post(
      "/v1/completions", R"({"model":"spindle-mini","prompt":"Say it:","max_tokens":100})");
  ASSERT_EQ(response.status, 200) << response.body;
  const json::value body = response.json();
  EXPECT_EQ(text_of(body, "/object"), "text_completion");
  EXPECT_EQ(text_of(body, "/model"), "spindle-mini");
  EXPECT_THAT(text_of(body, "/id"), ::testing::StartsWith("cmpl-"));
  EXPECT_EQ(text_of(body, "/choices/0/text"), ApiTestServer::kText);
  EXPECT_EQ(text_of(body, "/choices/0/finish_reason"), "stop");
  EXPECT_EQ(text_of(body, "/choices/0/stop_reason"), "null");
  EXPECT_EQ(text_of(body, "/choices/0/logprobs"), "null");
  const std::size_t n_prompt = server.ids_of("Say it:").size();
  const std::size_t n_output = server.ids_of(ApiTestServer::kText).size() + 1;  // and the end
  EXPECT_EQ(text_of(body, "/usage/prompt_tokens"), std::to_string(n_prompt));
  EXPECT_EQ(text_of(body, "/usage/completion_tokens"), std::to_string(n_output));
  EXPECT_EQ(text_of(body, "/usage/total_tokens"), std::to_string(n_prompt + n_output));
}

TEST(HttpServer, DefaultsToSixteenTokensForCompletionsAndToTheContextForChat) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  client.post("/v1/completions", R"({"prompt":"a","ignore_eos":true})");
  client.post("/v1/chat/completions",
              R"({"messages":[{"role":"user","content":"a"}],"ignore_eos":true})");
  const auto requests = server.engine().submitted();
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_EQ(requests[0].sampling.max_tokens, 16);
  EXPECT_EQ(requests[1].sampling.max_tokens,
            512 - static_cast<std::int32_t>(requests[1].prompt_ids.size()));
}

TEST(HttpServer, AnswersAChat) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const TestResponse response = client.post(
      "/v1/chat/completions",
      R"({"model":"spindle-mini","messages":[{"role":"user","content":"Hi"}],"max_tokens":2})");
  ASSERT_EQ(response.status, 200) << response.body;
  const json::value body = response.json();
  EXPECT_EQ(text_of(body, "/object"), "chat.completion");
  EXPECT_EQ(text_of(body, "/choices/0/message/role"), "assistant");
  EXPECT_EQ(text_of(body, "/choices/0/message/content"), " The quick");
  EXPECT_EQ(text_of(body, "/choices/0/finish_reason"), "length");
  const auto requests = server.engine().submitted();
  ASSERT_EQ(requests.size(), 1u);
  EXPECT_EQ(requests[0].prompt_ids,
            server.ids_of("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"));
}

TEST(HttpServer, StreamsAChatAsServerSentEvents) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const TestResponse response =
      client.post("/v1/chat/completions",
                  R"({"messages":[{"role":"user","content":"Hi"}],"stream":true,"max_tokens":50,)"
                  R"("stream_options":{"include_usage":true}})");
  ASSERT_EQ(response.status, 200);
  EXPECT_THAT(response.headers.at("content-type"), HasSubstr("text/event-stream"));
  std::vector<std::string> events = response.events();
  ASSERT_GE(events.size(), 4u);
  EXPECT_EQ(events.back(), "[DONE]");
  events.pop_back();
  const json::value usage = json::parse(events.back());
  events.pop_back();
  EXPECT_EQ(text_of(usage, "/choices"), "[]");
  EXPECT_GT(usage.at_pointer("/usage/completion_tokens").as_int64(), 0);

  const json::value first = json::parse(events.front());
  EXPECT_EQ(text_of(first, "/object"), "chat.completion.chunk");
  EXPECT_EQ(text_of(first, "/choices/0/delta/role"), "assistant");
  EXPECT_EQ(text_of(first, "/choices/0/delta/content"), "");
  EXPECT_EQ(text_of(first, "/usage"), "null");
  const json::value last = json::parse(events.back());
  EXPECT_EQ(text_of(last, "/choices/0/delta"), "{}");
  EXPECT_EQ(text_of(last, "/choices/0/finish_reason"), "stop");

  std::string text;
  for (std::size_t i = 1; i + 1 < events.size(); ++i) {
    const json::value event = json::parse(events[i]);
    EXPECT_EQ(text_of(event, "/id"), text_of(first, "/id"));
    EXPECT_EQ(text_of(event, "/choices/0/finish_reason"), "null");
    text += text_of(event, "/choices/0/delta/content");
  }
  EXPECT_EQ(text, ApiTestServer::kText);
}

TEST(HttpServer, StreamsACompletionWithoutUsageUnlessAsked) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const TestResponse response =
      client.post("/v1/completions", R"({"prompt":"Hi","stream":true,"max_tokens":50})");
  std::vector<std::string> events = response.events();
  ASSERT_GE(events.size(), 2u);
  EXPECT_EQ(events.back(), "[DONE]");
  events.pop_back();
  std::string text;
  for (const std::string& event : events) {
    const json::value value = json::parse(event);
    EXPECT_FALSE(value.as_object().contains("usage"));
    EXPECT_EQ(text_of(value, "/object"), "text_completion");
    text += text_of(value, "/choices/0/text");
  }
  EXPECT_EQ(text, ApiTestServer::kText);
  EXPECT_EQ(text_of(json::parse(events.back()), "/choices/0/finish_reason"), "stop");
}

TEST(HttpServer, NumbersChoicesAcrossPrompts) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const TestResponse response = client.post(
      "/v1/completions", R"({"prompt":["one","two"],"n":2,"echo":true,"max_tokens":1})");
  ASSERT_EQ(response.status, 200) << response.body;
  const json::value body = response.json();
  std::vector<std::string> texts;
  for (const json::value& choice : body.at("choices").as_array()) {
    EXPECT_EQ(choice.at("index").as_int64(), static_cast<std::int64_t>(texts.size()));
    texts.push_back(text_of(choice, "/text"));
  }
  EXPECT_THAT(texts, ElementsAre("one The", "one The", "two The", "two The"));
  EXPECT_EQ(text_of(body, "/usage/completion_tokens"), "4");
}

TEST(HttpServer, TakesTokenIdsAsPrompts) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  EXPECT_EQ(client.post("/v1/completions", R"({"prompt":[5,6,7]})").status, 200);
  EXPECT_EQ(client.post("/v1/completions", R"({"prompt":[[8],[9,10]]})").status, 200);
  const auto requests = server.engine().submitted();
  ASSERT_EQ(requests.size(), 3u);
  EXPECT_THAT(requests[0].prompt_ids, ElementsAre(5, 6, 7));
  EXPECT_THAT(requests[1].prompt_ids, ElementsAre(8));
  EXPECT_THAT(requests[2].prompt_ids, ElementsAre(9, 10));
}

TEST(HttpServer, ReportsLogprobsInBothShapes) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const json::value completion =
      client.post("/v1/completions", R"({"prompt":"a","logprobs":2,"max_tokens":2})").json();
  EXPECT_EQ(text_of(completion, "/choices/0/logprobs/tokens"), R"([" The"," quick"])");
  EXPECT_EQ(text_of(completion, "/choices/0/logprobs/text_offset"), "[0,4]");
  EXPECT_EQ(text_of(completion, "/choices/0/logprobs/token_logprobs"), "[-5E-1,-5E-1]");
  EXPECT_EQ(completion.at_pointer("/choices/0/logprobs/top_logprobs/0").as_object().size(), 2u);

  const json::value chat =
      client
          .post("/v1/chat/completions",
                R"({"messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":2,)"
                R"("max_tokens":2})")
          .json();
  const json::array& content = chat.at_pointer("/choices/0/logprobs/content").as_array();
  ASSERT_EQ(content.size(), 2u);
  EXPECT_EQ(text_of(content[0], "/token"), " The");
  EXPECT_EQ(text_of(content[0], "/bytes"), "[32,84,104,101]");
  EXPECT_EQ(content[0].at("top_logprobs").as_array().size(), 2u);
}

TEST(HttpServer, StopsAtAStopString) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const json::value body =
      client
          .post("/v1/completions",
                R"({"prompt":"a","stop":["brown fox",". zzz"],"max_tokens":200,"ignore_eos":true})")
          .json();
  EXPECT_EQ(text_of(body, "/choices/0/text"), " The quick ");
  EXPECT_EQ(text_of(body, "/choices/0/finish_reason"), "stop");
  EXPECT_EQ(text_of(body, "/choices/0/stop_reason"), "brown fox");
  EXPECT_EQ(text_of(body, "/usage/completion_tokens"),
            std::to_string(server.ids_of(" The quick brown fox").size()));
}

TEST(HttpServer, ListsTheModel) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const json::value list = client.get("/v1/models").json();
  EXPECT_EQ(text_of(list, "/object"), "list");
  EXPECT_EQ(text_of(list, "/data/0/id"), "spindle-mini");
  EXPECT_EQ(text_of(list, "/data/0/max_model_len"), "512");
  EXPECT_EQ(text_of(client.get("/v1/models/spindle%2Dmini").json(), "/id"), "spindle-mini");
  const TestResponse missing = client.get("/v1/models/other");
  EXPECT_EQ(missing.status, 404);
  EXPECT_EQ(missing.error("code"), "model_not_found");
}

TEST(HttpServer, TokenizesAndDetokenizes) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const json::value tokens =
      client.post("/tokenize", R"({"prompt":"Hello world","return_token_strs":true})").json();
  const auto ids = server.ids_of("Hello world");
  EXPECT_EQ(text_of(tokens, "/count"), std::to_string(ids.size()));
  EXPECT_EQ(text_of(tokens, "/max_model_len"), "512");
  EXPECT_EQ(tokens.at("token_strs").as_array().size(), ids.size());
  const json::value chat =
      client.post("/tokenize", R"({"messages":[{"role":"user","content":"x"}]})").json();
  EXPECT_EQ(chat.at("count").as_int64(),
            static_cast<std::int64_t>(
                server.ids_of("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n").size()));
  const TestResponse text =
      client.post("/detokenize", R"({"tokens":)" + json::serialize(tokens.at("tokens")) + "}");
  EXPECT_EQ(text.body, R"({"prompt":"Hello world"})");
  EXPECT_EQ(client.post("/detokenize", R"({"tokens":[-1]})").status, 400);
  EXPECT_EQ(client.post("/detokenize", R"({"tokens":[99999999]})").status, 400);
}

TEST(HttpServer, ShowsItsState) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  client.post("/v1/completions", R"({"prompt":"a"})");
  const json::value state = client.get("/v1/spindle/state").json();
  EXPECT_EQ(text_of(state, "/requests/finished"), "1");
  EXPECT_EQ(state.at("stages").as_array().size(), 2u);
  EXPECT_EQ(text_of(state, "/stages/1/layers/1/layer"), "3");
  EXPECT_EQ(text_of(state, "/stages/1/layers/1/used_bytes"), "200");
  EXPECT_EQ(client.get("/version").body, R"({"version":"1.2.3"})");
  const TestResponse metrics = client.get("/metrics");
  EXPECT_THAT(metrics.headers.at("content-type"), HasSubstr("text/plain"));
  EXPECT_THAT(metrics.body,
              HasSubstr("spindle_requests_finished_total{model_name=\"spindle-mini\"} 1"));
  EXPECT_THAT(metrics.body, HasSubstr("spindle_http_requests_total{"));
  EXPECT_EQ(client.get("/page").body, "<p>a page</p>");
}

TEST(HttpServer, TellsLifeFromReadinessWhileItDrains) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  for (const char* path : {"/health", "/live", "/ready"}) EXPECT_EQ(client.get(path).status, 200);
  const TestResponse drain = client.post("/v1/spindle/drain", "");
  EXPECT_EQ(drain.status, 202);
  EXPECT_EQ(drain.body, R"({"draining":true,"running_requests":0})");
  EXPECT_EQ(server.n_drains(), 1);
  EXPECT_EQ(client.get("/health").status, 200);
  EXPECT_EQ(client.get("/live").status, 200);
  EXPECT_EQ(client.get("/ready").status, 503);
  const TestResponse refused = client.post("/v1/completions", R"({"prompt":"a"})");
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.error("code"), "draining");
  EXPECT_EQ(refused.headers.at("retry-after"), "1");
}

TEST(HttpServer, IsUnhealthyWhenTheEngineIsGone) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  server.engine().set_admission(unavailable("the engine has stopped"));
  EXPECT_EQ(client.get("/health").status, 503);
  EXPECT_EQ(client.get("/live").status, 200);
  EXPECT_EQ(client.get("/ready").status, 503);
}

TEST(HttpServer, AnswersPipelinedRequestsInOrder) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  std::string bytes;
  for (int i = 0; i < 5; ++i) {
    bytes += post_text("/v1/completions",
                       R"({"prompt":"p)" + std::to_string(i) + R"(","echo":true,"max_tokens":1})");
  }
  bytes += "GET /live HTTP/1.1\r\nHost: test\r\n\r\n";
  client.send(bytes);
  for (int i = 0; i < 5; ++i) {
    const TestResponse response = client.receive();
    ASSERT_EQ(response.status, 200);
    EXPECT_EQ(text_of(response.json(), "/choices/0/text"), "p" + std::to_string(i) + " The");
  }
  EXPECT_EQ(client.receive().status, 200);
}

TEST(HttpServer, KnowsItsMethods) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  client.send("HEAD /health HTTP/1.1\r\nHost: test\r\n\r\n");
  const TestResponse head = client.receive(/*has_body=*/false);
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), "15");
  client.send("OPTIONS /v1/models HTTP/1.1\r\nHost: test\r\n\r\n");
  const TestResponse options = client.receive();
  EXPECT_EQ(options.status, 204);
  EXPECT_EQ(options.headers.at("allow"), "GET, HEAD, OPTIONS");
  const TestResponse wrong = client.get("/v1/completions");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.headers.at("allow"), "POST, OPTIONS");
  EXPECT_EQ(wrong.error("code"), "method_not_allowed");
  EXPECT_EQ(client.get("/nowhere").status, 404);
  EXPECT_EQ(client.post("/v1/models", "{}").status, 405);
}

TEST(HttpServer, ClosesHttpOneDotZeroStreamsAtTheirEnd) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  const std::string body = R"({"prompt":"a","stream":true})";
  client.send("POST /v1/completions HTTP/1.0\r\nContent-Length: " + std::to_string(body.size()) +
              "\r\n\r\n" + body);
  std::string all;
  for (std::string part = client.read_some(); !part.empty(); part = client.read_some()) all += part;
  EXPECT_THAT(all, HasSubstr("Connection: close"));
  EXPECT_THAT(all, ::testing::Not(HasSubstr("chunked")));
  EXPECT_THAT(all, ::testing::EndsWith("data: [DONE]\n\n"));
}

TEST(HttpServer, EchoesARequestIdAfterCleaningIt) {
  ApiTestServer server;
  HttpTestClient client(server.port());
  EXPECT_EQ(client.get("/live", "X-Request-Id: abc-1.2:3\r\n").headers.at("x-request-id"),
            "abc-1.2:3");
  EXPECT_EQ(client.get("/live", "X-Request-Id: a<b>\"c d\r\n").headers.at("x-request-id"), "abcd");
  EXPECT_EQ(client.get("/live", "X-Request-Id: " + std::string(5000, 'x') + "\r\n")
                .headers.at("x-request-id"),
            std::string(128, 'x'));
  EXPECT_EQ(client.get("/live").headers.at("x-request-id").size(), 32u);
  const TestResponse response =
      client.post("/v1/completions", R"({"prompt":"a"})", "X-Request-Id: mine\r\n");
  EXPECT_EQ(text_of(response.json(), "/id"), "cmpl-mine");
  EXPECT_EQ(server.engine().submitted().at(0).request_id, "mine");
}

TEST(HttpServer, ServesTwoHundredStreamsAtOnce) {
  ApiTestOptions options;
  options.script_for = [](const engine::EngineRequest& request) {
    return FakeScript{
        .tokens = request.prompt_ids, .token_delay = std::chrono::milliseconds(2), .failure = {}};
  };
  ApiTestServer server(options);
  constexpr int kClients = 200;
  std::vector<std::unique_ptr<HttpTestClient>> clients;
  for (int i = 0; i < kClients; ++i) {
    clients.push_back(std::make_unique<HttpTestClient>(server.port()));
    clients.back()->set_timeout(std::chrono::seconds(60));
    clients.back()->send(
        post_text("/v1/completions", R"({"prompt":"this is client number )" + std::to_string(i) +
                                         R"(","stream":true,"max_tokens":20,"ignore_eos":true})"));
  }
  for (int i = 0; i < kClients; ++i) {
    const TestResponse response = clients[static_cast<std::size_t>(i)]->receive();
    ASSERT_EQ(response.status, 200) << i;
    std::string text;
    const auto events = response.events();
    ASSERT_EQ(events.back(), "[DONE]");
    for (std::size_t k = 0; k + 1 < events.size(); ++k) {
      text += text_of(json::parse(events[k]), "/choices/0/text");
    }
    EXPECT_THAT(text, ::testing::StartsWith("this is client number " + std::to_string(i) + "this"));
  }
  EXPECT_TRUE(server.engine().wait_for(
      [](const engine::EngineStats& stats) { return stats.finished == kClients; },
      Deadline::after_ms(5000)));
}

TEST(HttpServer, SaysWhatBecameOfTheKv) {
  ApiTestOptions options;
  options.script_for = [](const engine::EngineRequest&) {
    FakeScript script;
    script.tokens = {300};
    script.summary.cached_tokens = 3;
    script.summary.kv = {{.stage = 0, .full_bytes = 64, .kept_bytes = 8, .layers = {{0, 64, 8}}}};
    return script;
  };
  ApiTestServer server(std::move(options));
  HttpTestClient client(server.port());
  const TestResponse response =
      client.post("/v1/completions",
                  R"({"prompt":["a","b"],"kv_policy":{"profile":"int4"},"compress_at":[1]})");
  ASSERT_EQ(response.status, 200) << response.body;
  const json::value body = response.json();
  EXPECT_EQ(text_of(body, "/usage/prompt_tokens_details/cached_tokens"), "6");
  EXPECT_EQ(text_of(body, "/usage/spindle_kv/full_bytes"), "128");
  EXPECT_EQ(text_of(body, "/usage/spindle_kv/kept_bytes"), "16");
  EXPECT_EQ(text_of(body, "/usage/spindle_kv/stages/0/layers/0/kept_bytes"), "16");
  for (const engine::EngineRequest& request : server.engine().submitted()) {
    EXPECT_EQ(request.kv_policy.profile, kvstore::KvProfile::kInt4);
    EXPECT_THAT(request.compress_at, ElementsAre(1));
  }
  const TestResponse wrong =
      client.post("/v1/completions", R"({"prompt":"a","kv_policy":{"profile":"full","ratio":0}})");
  EXPECT_EQ(wrong.status, 400);
  EXPECT_EQ(text_of(wrong.json(), "/error/param"), "kv_policy.ratio");
}

TEST(HttpServer, SessionsBelongToTheirKey) {
  ApiTestOptions options;
  options.api_keys = {"alpha", "beta"};
  ApiTestServer server(std::move(options));
  const std::string body = R"({"prompt":"a","session_id":"s","keep_session":true})";
  for (const char* key : {"alpha", "beta", "alpha"}) {
    HttpTestClient client(server.port());
    const TestResponse response =
        client.post("/v1/completions", body, "Authorization: Bearer " + std::string(key) + "\r\n");
    ASSERT_EQ(response.status, 200) << response.body;
  }
  const auto requests = server.engine().submitted();
  ASSERT_EQ(requests.size(), 3u);
  EXPECT_NE(requests[0].owner, 0u);
  EXPECT_NE(requests[0].owner, requests[1].owner);
  EXPECT_EQ(requests[0].owner, requests[2].owner);
}

}  // namespace
}  // namespace spindle::api
