#include "cluster/api/tcp_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "tests/cluster/api/tcp_test_server.h"

namespace spindle::api {
namespace {

using testing::HasSubstr;

std::unique_ptr<TcpClient> connect_to(const TcpTestServer& test) {
  Result<std::unique_ptr<TcpClient>> client =
      TcpClient::connect({.port = test.server->port()}, Deadline::after_ms(5000));
  EXPECT_TRUE(client.ok()) << client.status().to_string();
  return std::move(client).value();
}

v1::GenerateRequest text_request(const std::string& text) {
  v1::GenerateRequest request;
  request.set_text(text);
  return request;
}

TEST(TcpClient, GenerateStreamsAndReturnsTheWhole) {
  TcpTestServer test;
  const auto client = connect_to(test);
  EXPECT_EQ(client->welcome().model(), "scripted");
  std::string streamed;
  v1::GenerateRequest request = text_request("a b c");
  request.mutable_sampling()->set_n(2);
  const GenerateOutcome outcome = client->generate(request, [&](const v1::Delta& delta) {
    if (delta.choice() == 1) streamed += delta.text();
  });
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.to_string();
  EXPECT_EQ(streamed, "a b c");
  ASSERT_EQ(outcome.choices.size(), 2U);
  EXPECT_EQ(outcome.choices[0].text, "a b c");
  EXPECT_EQ(outcome.choices[0].token_ids, (std::vector<std::int32_t>{0, 1, 2}));
  EXPECT_EQ(outcome.choices[0].finish_reason, v1::STOP);
  EXPECT_EQ(outcome.choices[0].stop_reason, "2");
  EXPECT_EQ(outcome.prompt_tokens, 3);
  EXPECT_EQ(outcome.usage.completion_tokens(), 6);
  EXPECT_EQ(client->n_open(), 0U);
}

TEST(TcpClient, RefusalsKeepTheirParamAndRetryTime) {
  TcpTestServer test;
  const auto client = connect_to(test);
  GenerateOutcome outcome = client->generate(text_request("invalid"), {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(outcome.param, "sampling.top_p");
  outcome = client->generate(text_request("refuse"), {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(outcome.retry_after_ms, 250);
  outcome = client->generate(text_request("fail"), {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kInternal);
  ASSERT_EQ(outcome.choices.size(), 1U);
  EXPECT_EQ(outcome.choices[0].text, "partial ");
  EXPECT_TRUE(client->generate(text_request("still fine"), {}).status.ok());
}

TEST(TcpClient, CancelFromAnotherThread) {
  TcpTestServer test;
  const auto client = connect_to(test);
  CancelEvent cancel;
  std::thread other([&] {
    test.service.wait_until([](const auto& now) { return now.started == 1; });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    cancel.trigger();
  });
  const GenerateOutcome outcome =
      client->generate(text_request("slow"), {}, {.cancel_fd = cancel.fd()});
  other.join();
  EXPECT_EQ(outcome.status.code(), StatusCode::kCancelled);
  ASSERT_FALSE(outcome.choices.empty());
  EXPECT_THAT(outcome.choices[0].text, HasSubstr("word"));
  EXPECT_EQ(test.service.counts().cancelled, 1);
  EXPECT_TRUE(client->generate(text_request("next"), {}).status.ok());
}

TEST(TcpClient, NoProgressCancelsAndReports) {
  TcpTestServer test;
  const auto client = connect_to(test);
  const GenerateOutcome outcome = client->generate(
      text_request("silent"), {}, {.progress_timeout = std::chrono::milliseconds(100)});
  EXPECT_EQ(outcome.status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(test.service.counts().cancelled, 1);
  EXPECT_TRUE(client->connection_status().ok());
}

TEST(TcpClient, ManyRequestsAtOnce) {
  TcpTestServer test;
  const auto client = connect_to(test);
  std::vector<std::uint64_t> ids;
  for (int i = 0; i < 64; ++i) {
    const Result<std::uint64_t> id =
        client->submit(text_request("request " + std::to_string(i)), {});
    ASSERT_TRUE(id.ok());
    ids.push_back(*id);
  }
  EXPECT_EQ(client->n_open(), 64U);
  while (client->n_open() > 0) {
    ASSERT_TRUE(client->run(Deadline::after_ms(5000)).ok());
  }
  for (int i = 0; i < 64; ++i) {
    const GenerateOutcome outcome = client->take(ids[static_cast<std::size_t>(i)]);
    ASSERT_TRUE(outcome.status.ok());
    EXPECT_EQ(outcome.choices.at(0).text, "request " + std::to_string(i));
  }
  EXPECT_EQ(client->take(ids[0]).status.code(), StatusCode::kNotFound);
}

// A request larger than the socket buffers while the server streams: both directions move.
TEST(TcpClient, LargeRequestDuringAStream) {
  TcpTestServer test;
  const auto client = connect_to(test);
  const Result<std::uint64_t> slow = client->submit(text_request("slow"), {});
  ASSERT_TRUE(slow.ok());
  v1::GenerateRequest large = text_request(std::string(8U << 20U, 'x'));
  large.mutable_sampling()->set_max_tokens(0);
  EXPECT_TRUE(client->generate(std::move(large), {}).status.ok());
  client->cancel(*slow);
  ASSERT_TRUE(client->run(Deadline::after_ms(5000)).ok());
  EXPECT_EQ(client->take(*slow).status.code(), StatusCode::kCancelled);
}

TEST(TcpClient, TooLargeForAFrame) {
  TcpTestServer test;
  const auto client = connect_to(test);
  const GenerateOutcome outcome =
      client->generate(text_request(std::string(kDefaultMaxFrameBytes, 'x')), {});
  EXPECT_EQ(outcome.status.code(), StatusCode::kTooLarge);
  EXPECT_TRUE(client->connection_status().ok());
}

TEST(TcpClient, StatsDrainPing) {
  TcpTestServer test;
  const auto client = connect_to(test);
  const Result<v1::Stats> stats = client->stats(Deadline::after_ms(5000));
  ASSERT_TRUE(stats.ok());
  EXPECT_EQ(stats->stages_size(), 2);
  EXPECT_TRUE(client->ping(Deadline::after_ms(5000)).ok());
  const Result<v1::DrainReply> drained = client->drain(Deadline::after_ms(5000));
  ASSERT_TRUE(drained.ok());
  EXPECT_EQ(drained->running_requests(), 0);
  EXPECT_EQ(client->wait_closed(Deadline::after_ms(50)).code(), StatusCode::kDeadlineExceeded);
  test.server->stop();
  EXPECT_TRUE(client->wait_closed(Deadline::after_ms(5000)).ok());
  EXPECT_EQ(client->stats(Deadline::after_ms(100)).status().code(), StatusCode::kUnavailable);
}

TEST(TcpClient, ServerThatStopsEndsTheRequest) {
  TcpTestServer test;
  const auto client = connect_to(test);
  std::thread other([&] {
    test.service.wait_until([](const auto& now) { return now.started == 1; });
    test.server->stop();
  });
  const GenerateOutcome outcome = client->generate(text_request("slow"), {});
  other.join();
  EXPECT_EQ(outcome.status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(outcome.status.message(), "the server stops");
}

TEST(TcpClient, ConnectErrors) {
  std::uint16_t free_port = 0;
  {
    TcpTestServer test;
    free_port = test.server->port();
  }
  const auto refused = TcpClient::connect({.port = free_port}, Deadline::after_ms(2000));
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(refused.status().message(),
            "cannot reach 127.0.0.1:" + std::to_string(free_port) + ": connection refused");

  TcpServerOptions options;
  options.api_keys = {"right"};
  TcpTestServer test(options);
  const auto wrong = TcpClient::connect({.port = test.server->port(), .api_key = "wrong"},
                                        Deadline::after_ms(5000));
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.status().code(), StatusCode::kUnauthenticated);
  EXPECT_TRUE(TcpClient::connect({.port = test.server->port(), .api_key = "right"},
                                 Deadline::after_ms(5000))
                  .ok());
}

// Something listens but never speaks.
TEST(TcpClient, SilentServer) {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(::bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(listener, 1), 0);
  socklen_t size = sizeof address;
  ASSERT_EQ(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const auto client =
      TcpClient::connect({.port = ntohs(address.sin_port)}, Deadline::after_ms(100));
  ASSERT_FALSE(client.ok());
  EXPECT_EQ(client.status().code(), StatusCode::kDeadlineExceeded);
  ::close(listener);
}

TEST(TcpClient, HostName) {
  TcpTestServer test;
  EXPECT_TRUE(TcpClient::connect({.host = "localhost", .port = test.server->port()},
                                 Deadline::after_ms(5000))
                  .ok());
  const auto unknown =
      TcpClient::connect({.host = "no such host", .port = 1}, Deadline::after_ms(5000));
  ASSERT_FALSE(unknown.ok());
  EXPECT_THAT(unknown.status().message(), HasSubstr("cannot find the host"));
}

}  // namespace
}  // namespace spindle::api
