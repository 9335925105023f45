// The TCP server over the real completion service, the real tokenizer and an engine that generates
// scripted tokens.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "cluster/api/tcp_client.h"
#include "cluster/api/tcp_server.h"
#include "tests/cluster/api/api_test_server.h"

namespace spindle::api {
namespace {

class TcpServiceTest : public testing::Test {
 protected:
  void start(ApiTestOptions options = {}) {
    front_end_ = std::make_unique<ApiTestServer>(std::move(options));
    TcpServerHooks hooks;
    hooks.start = [this](GenerateRequest request, boost::asio::any_io_executor executor,
                         std::shared_ptr<OutputSink> sink) {
      return front_end_->service().start(std::move(request), std::move(executor), std::move(sink));
    };
    hooks.stats = [this] { return front_end_->engine().stats(); };
    hooks.drain = [this] { return front_end_->engine().stats().running; };
    TcpServerOptions server_options;
    server_options.port = 0;
    server_options.model = ApiTestServer::kModel;
    Result<std::unique_ptr<TcpServer>> server =
        TcpServer::listen(front_end_->io(), std::move(server_options), std::move(hooks));
    ASSERT_TRUE(server.ok()) << server.status().to_string();
    server_ = std::move(server).value();
    Result<std::unique_ptr<TcpClient>> client =
        TcpClient::connect({.port = server_->port()}, Deadline::after_ms(5000));
    ASSERT_TRUE(client.ok()) << client.status().to_string();
    client_ = std::move(client).value();
  }

  void TearDown() override {
    client_.reset();
    if (server_) {
      server_->stop();
      EXPECT_TRUE(server_->wait_stopped(Deadline::after_ms(15'000)));
    }
    server_.reset();
  }

  static v1::GenerateRequest text_request(const std::string& text) {
    v1::GenerateRequest request;
    request.set_text(text);
    request.mutable_sampling()->set_max_tokens(400);
    return request;
  }

  std::unique_ptr<ApiTestServer> front_end_;
  std::unique_ptr<TcpServer> server_;
  std::unique_ptr<TcpClient> client_;
};

TEST_F(TcpServiceTest, TextIsTokenisedGeneratedAndDetokenised) {
  start();
  const GenerateOutcome outcome = client_->generate(text_request("Once upon a time"), {});
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.to_string();
  ASSERT_EQ(outcome.choices.size(), 1U);
  EXPECT_EQ(outcome.choices[0].text, ApiTestServer::kText);
  EXPECT_EQ(outcome.choices[0].finish_reason, v1::STOP);
  EXPECT_EQ(outcome.prompt_tokens, outcome.usage.prompt_tokens());
  EXPECT_GT(outcome.prompt_tokens, 1);
  EXPECT_FALSE(outcome.request_id.empty());
}

TEST_F(TcpServiceTest, StopStringsAndLimitsAreTheServices) {
  start();
  v1::GenerateRequest request = text_request("x");
  request.mutable_sampling()->add_stop("fox");
  GenerateOutcome outcome = client_->generate(request, {});
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.to_string();
  EXPECT_EQ(outcome.choices.at(0).text, " The quick brown ");
  EXPECT_EQ(outcome.choices.at(0).stop_reason, "fox");

  request = text_request("x");
  request.mutable_sampling()->set_top_p(2.0F);
  outcome = client_->generate(request, {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(outcome.param, "sampling.top_p");

  request = text_request("x");
  request.set_model("another");
  outcome = client_->generate(request, {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kNotFound);
  EXPECT_EQ(outcome.param, "model");
}

TEST_F(TcpServiceTest, CancelAndDisconnectReachTheEngine) {
  ApiTestOptions options;
  options.script_for = [](const engine::EngineRequest&) {
    FakeScript script;
    script.tokens.assign(400, 300);
    script.token_delay = std::chrono::milliseconds(5);
    return script;
  };
  start(std::move(options));
  const Result<std::uint64_t> id = client_->submit(text_request("one"), {});
  ASSERT_TRUE(id.ok());
  ASSERT_EQ(client_->run(Deadline::after_ms(100)).code(), StatusCode::kDeadlineExceeded);
  client_->cancel(*id);
  ASSERT_TRUE(client_->run(Deadline::after_ms(5000)).ok());
  EXPECT_EQ(client_->take(*id).status.code(), StatusCode::kCancelled);

  ASSERT_TRUE(client_->submit(text_request("two"), {}).ok());
  ASSERT_TRUE(client_->submit(text_request("three"), {}).ok());
  [[maybe_unused]] const Status sent = client_->run(Deadline::after_ms(100));
  client_.reset();
  EXPECT_TRUE(front_end_->engine().wait_for(
      [](const engine::EngineStats& stats) {
        return stats.cancelled == 3 && stats.running == 0 && stats.waiting == 0;
      },
      Deadline::after_ms(5000)));
}

TEST_F(TcpServiceTest, OverloadSaysWhenToTryAgain) {
  start();
  front_end_->engine().set_admission(resource_exhausted("the queue is full"));
  const GenerateOutcome outcome = client_->generate(text_request("x"), {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kResourceExhausted);
  EXPECT_GT(outcome.retry_after_ms, 0);
}

// Megabytes of scores, many times what may be buffered of a request's output.
TEST_F(TcpServiceTest, ScoresArriveWholeAndInOrder) {
  ApiTestOptions options;
  options.max_model_len = 1024;
  start(std::move(options));
  std::string text;
  while (front_end_->ids_of(text).size() < 300) text += " The quick brown fox jumps.";
  v1::GenerateRequest request = text_request(text);
  request.mutable_prompt_scores()->set_first(2);
  request.mutable_prompt_scores()->set_end(258);
  request.mutable_prompt_scores()->set_dense(true);
  const Result<std::uint64_t> id = client_->submit(request, {});
  ASSERT_TRUE(id.ok());
  // Another request on the connection is not held up, and not cancelled for the bytes that wait.
  const GenerateOutcome other = client_->generate(text_request("x"), {});
  ASSERT_TRUE(other.status.ok()) << other.status.to_string();
  EXPECT_EQ(other.choices.at(0).text, ApiTestServer::kText);
  while (!client_->finished(*id)) {
    ASSERT_TRUE(client_->run(Deadline::after_ms(10'000)).ok());
  }
  const GenerateOutcome outcome = client_->take(*id);
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.to_string();
  EXPECT_EQ(outcome.choices.at(0).text, ApiTestServer::kText);
  ASSERT_EQ(outcome.prompt_scores.size(), 256U);
  const std::int32_t vocab = front_end_->engine().limits().vocab_size;
  for (std::size_t i = 0; i < outcome.prompt_scores.size(); ++i) {
    const v1::PromptScore& score = outcome.prompt_scores[i];
    const engine::PromptScore expected =
        fake_score(static_cast<std::int32_t>(i) + 2, /*dense=*/true, vocab);
    ASSERT_EQ(score.position(), expected.position);
    EXPECT_EQ(score.logprob(), expected.logprob);
    EXPECT_EQ(score.best_id(), expected.best_id);
    ASSERT_TRUE(std::equal(score.dense().begin(), score.dense().end(), expected.dense.begin(),
                           expected.dense.end()));
  }
}

TEST_F(TcpServiceTest, CancelWhileScoresWait) {
  ApiTestOptions options;
  options.max_model_len = 1024;
  options.script_for = [](const engine::EngineRequest&) {
    FakeScript script;
    script.tokens.assign(400, 300);
    script.token_delay = std::chrono::milliseconds(5);
    return script;
  };
  start(std::move(options));
  std::string text;
  while (front_end_->ids_of(text).size() < 300) text += " The quick brown fox jumps.";
  v1::GenerateRequest request = text_request(text);
  request.mutable_prompt_scores()->set_first(1);
  request.mutable_prompt_scores()->set_end(257);
  request.mutable_prompt_scores()->set_dense(true);
  const Result<std::uint64_t> id = client_->submit(request, {});
  ASSERT_TRUE(id.ok());
  // Nothing is read meanwhile, so that scores wait in the server.
  ASSERT_TRUE(front_end_->engine().wait_for(
      [](const engine::EngineStats& stats) { return stats.generation_tokens > 20; },
      Deadline::after_ms(10'000)));
  client_->cancel(*id);
  ASSERT_TRUE(client_->run(Deadline::after_ms(10'000)).ok());
  const GenerateOutcome outcome = client_->take(*id);
  EXPECT_EQ(outcome.status.code(), StatusCode::kCancelled);
  EXPECT_TRUE(client_->ping(Deadline::after_ms(5000)).ok());
}

TEST_F(TcpServiceTest, UsageNamesTheKvOfEveryLayer) {
  ApiTestOptions options;
  options.script_for = [](const engine::EngineRequest&) {
    FakeScript script;
    script.tokens = {300};
    script.summary.cached_tokens = 3;
    script.summary.kv = {{.stage = 0, .full_bytes = 64, .kept_bytes = 8, .layers = {{0, 64, 8}}}};
    script.summary.boundaries.resize(2);
    return script;
  };
  start(std::move(options));
  const GenerateOutcome outcome = client_->generate(text_request("Once upon a time"), {});
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.to_string();
  EXPECT_EQ(outcome.usage.cached_tokens(), 3);
  EXPECT_EQ(outcome.usage.boundaries_size(), 2);
  EXPECT_EQ(outcome.usage.kv(0).layers(0).kept_bytes(), 8U);
}

TEST_F(TcpServiceTest, KvFieldsAreTheServices) {
  start();
  v1::GenerateRequest request = text_request("x");
  request.mutable_kv_policy()->set_ratio(1.5);
  const GenerateOutcome outcome = client_->generate(request, {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(outcome.param, "kv_policy.ratio");
}

}  // namespace
}  // namespace spindle::api
