#include "cluster/api/tcp_session.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "tests/cluster/api/tcp_test_server.h"

namespace spindle::api {
namespace {

using testing::HasSubstr;

TEST(TcpSession, CancelOneOfTwo) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "slow"));
  ASSERT_TRUE(raw.generate(2, "slow"));
  v1::Frame cancel;
  cancel.set_id(1);
  cancel.mutable_cancel();
  ASSERT_TRUE(raw.send(cancel));
  cancel.set_id(77);  // unknown: ignored
  ASSERT_TRUE(raw.send(cancel));
  std::optional<v1::Frame> frame;
  do {
    frame = raw.receive();
    ASSERT_TRUE(frame);
  } while (!frame->has_error());
  EXPECT_EQ(frame->id(), 1U);
  EXPECT_EQ(frame->error().code(), v1::CANCELLED_BY_CLIENT);
  for (int i = 0; i < 5; ++i) {
    frame = raw.receive();
    ASSERT_TRUE(frame && frame->has_delta());
    EXPECT_EQ(frame->id(), 2U);
  }
}

TEST(TcpSession, DisconnectCancelsAllRequests) {
  TcpTestServer test;
  {
    RawConnection raw(test.server->port());
    raw.shake_hands();
    for (std::uint64_t id = 1; id <= 3; ++id) {
      ASSERT_TRUE(raw.generate(id, id == 1 ? "silent" : "slow"));
    }
    ASSERT_TRUE(test.service.wait_until([](const auto& now) { return now.started == 3; }));
  }
  EXPECT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 3; }));
}

// The socket buffers fill, then the server's own; the request is cancelled, not the memory used.
TEST(TcpSession, SlowReaderLosesItsRequest) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_max_buffered_bytes(32'768); }));
  RawConnection raw(test.server->port(), 8192);
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "flood"));
  ASSERT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 1; }));
  // The connection is good: the rest of the output, the reason, and then the next request.
  std::optional<v1::Frame> frame;
  do {
    frame = raw.receive();
    ASSERT_TRUE(frame);
  } while (!frame->has_error());
  EXPECT_EQ(frame->id(), 1U);
  EXPECT_EQ(frame->error().code(), v1::RESOURCE_EXHAUSTED);
  EXPECT_THAT(frame->error().message(), HasSubstr("read fast enough"));
  ASSERT_TRUE(raw.generate(2, "ok"));
  frame = raw.receive();
  EXPECT_TRUE(frame && frame->has_accepted());
}

TEST(TcpSession, ReaderThatTakesNothingIsClosed) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_write_timeout_ms(200); }));
  RawConnection raw(test.server->port(), 8192);
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "flood"));
  const Deadline deadline = Deadline::after_ms(10'000);
  while (test.server->n_connections() > 0 && !deadline.passed()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_EQ(test.server->n_connections(), 0U);
}

// Requests for answers that are not read must not grow the server's memory: it stops reading.
TEST(TcpSession, FloodOfPingsIsHeldBack) {
  TcpTestServer test(with_limits([](auto& limits) {
    limits.set_max_buffered_bytes(4096);
    limits.set_write_timeout_ms(300);
  }));
  RawConnection raw(test.server->port(), 4096);
  raw.shake_hands();
  std::string pings;
  v1::Frame ping;
  ping.set_id(1);
  ping.mutable_ping();
  for (int i = 0; i < 4000; ++i) ASSERT_TRUE(append_frame(ping, 100, pings).ok());
  // The server closes the connection once nothing was read for write_timeout_ms.
  bool open = true;
  for (int i = 0; i < 100'000 && open; ++i) open = raw.send_bytes(pings);
  EXPECT_FALSE(open) << "3 GB of pings were taken";
}

TEST(TcpSession, SixtyFourRequestsOnOneConnection) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  std::map<std::uint64_t, std::string> expected;
  for (std::uint64_t id = 100; id < 164; ++id) {
    for (std::uint64_t word = 0; word < 20; ++word) {
      expected[id] += std::to_string(id * 1000 + word) + " ";
    }
    ASSERT_TRUE(raw.generate(id, expected[id]));
  }
  std::map<std::uint64_t, std::string> texts;
  std::size_t n_done = 0;
  while (n_done < expected.size()) {
    const std::optional<v1::Frame> frame = raw.receive();
    ASSERT_TRUE(frame);
    ASSERT_FALSE(frame->has_error()) << frame->ShortDebugString();
    if (frame->has_delta()) texts[frame->id()] += frame->delta().text();
    n_done += frame->has_done() ? 1 : 0;
  }
  EXPECT_EQ(texts, expected);
}

TEST(TcpSession, RequestsPerConnectionAreLimited) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_max_requests_per_connection(2); }));
  RawConnection raw(test.server->port());
  raw.shake_hands();
  for (std::uint64_t id = 1; id <= 3; ++id) ASSERT_TRUE(raw.generate(id, "silent"));
  std::optional<v1::Frame> frame;
  do {
    frame = raw.receive();
    ASSERT_TRUE(frame);
  } while (!frame->has_error());
  EXPECT_EQ(frame->id(), 3U);
  EXPECT_EQ(frame->error().code(), v1::RESOURCE_EXHAUSTED);
  EXPECT_GT(frame->error().retry_after_ms(), 0);
}

TEST(TcpSession, ConnectionsAreLimited) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_max_connections(2); }));
  auto first = std::make_unique<RawConnection>(test.server->port());
  first->shake_hands();
  RawConnection second(test.server->port());
  second.shake_hands();
  {
    RawConnection third(test.server->port());
    third.send_hello();
    const v1::Error error = third.expect_goodbye();
    EXPECT_EQ(error.code(), v1::RESOURCE_EXHAUSTED);
    EXPECT_GT(error.retry_after_ms(), 0);
  }
  first.reset();
  const Deadline deadline = Deadline::after_ms(5000);
  while (test.server->n_connections() > 1 && !deadline.passed()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  RawConnection fourth(test.server->port());
  fourth.shake_hands();
}

TEST(TcpSession, Stats) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "silent"));
  std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  v1::Frame request;
  request.set_id(2);
  request.mutable_stats_request();
  ASSERT_TRUE(raw.send(request));
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_stats());
  const v1::Stats& stats = frame->stats();
  EXPECT_EQ(frame->id(), 2U);
  EXPECT_EQ(stats.model(), "scripted");
  EXPECT_EQ(stats.server_version(), "9.9.9");
  EXPECT_EQ(stats.running_requests(), 1);
  EXPECT_EQ(stats.requests_accepted(), 1U);
  EXPECT_GE(stats.uptime_seconds(), 0.0);
  EXPECT_FALSE(stats.draining());
  ASSERT_EQ(stats.stages_size(), 2);
  EXPECT_EQ(stats.stages(1).first_layer(), 2);
  EXPECT_EQ(stats.stages(1).kv_capacity_bytes(), 64U << 20U);
  ASSERT_EQ(stats.stages(1).layers_size(), 2);
  EXPECT_EQ(stats.stages(1).layers(1).layer(), 3);
  EXPECT_EQ(stats.stages(1).layers(1).used_bytes(), 4U << 20U);
}

TEST(TcpSession, Drain) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "silent"));
  std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  v1::Frame request;
  request.set_id(2);
  request.mutable_drain_request();
  ASSERT_TRUE(raw.send(request));
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_drain_reply());
  EXPECT_EQ(frame->drain_reply().running_requests(), 1);
  EXPECT_EQ(test.service.counts().drains, 1);
}

TEST(TcpSession, StopSaysGoodbyeAndCancels) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "silent"));
  const std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  RawConnection idle(test.server->port());
  idle.shake_hands();
  test.server->stop();
  EXPECT_EQ(raw.expect_goodbye().code(), v1::UNAVAILABLE);
  EXPECT_EQ(idle.expect_goodbye().code(), v1::UNAVAILABLE);
  raw.close();
  idle.close();
  EXPECT_TRUE(test.server->wait_stopped(Deadline::after_ms(5000)));
  EXPECT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 1; }));
}

TEST(TcpSession, StopDoesNotWaitForADeafPeer) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_write_timeout_ms(200); }));
  RawConnection raw(test.server->port(), 4096);
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "flood"));
  test.service.wait_until([](const auto& now) { return now.started == 1; });
  test.server->stop();
  EXPECT_TRUE(test.server->wait_stopped(Deadline::after_ms(5000)));
}

TEST(TcpSession, AddressErrors) {
  TcpTestServer test;
  boost::asio::io_context io;
  TcpServerOptions options;
  options.port = test.server->port();
  const auto taken = TcpServer::listen(io, options, test.service.hooks());
  ASSERT_FALSE(taken.ok());
  EXPECT_EQ(taken.status().code(), StatusCode::kUnavailable);
  EXPECT_THAT(taken.status().message(), HasSubstr("in use"));
  options.host = "no such host";
  const auto unknown = TcpServer::listen(io, options, test.service.hooks());
  ASSERT_FALSE(unknown.ok());
  EXPECT_EQ(unknown.status().code(), StatusCode::kInvalidArgument);
}

v1::Frame scores_frame(std::uint64_t id, const std::string& prompt, std::int32_t n_scores) {
  v1::Frame frame;
  frame.set_id(id);
  frame.mutable_generate()->set_text(prompt);
  v1::PromptScores& scores = *frame.mutable_generate()->mutable_prompt_scores();
  scores.set_first(1);
  scores.set_end(1 + n_scores);
  scores.set_dense(true);
  return frame;
}

// 16 KiB for each score: far more than may be buffered, so the reader paces them, and the request's
// own frames keep their place behind them.
TEST(TcpSession, ScoresPrecedeTheOutputHoweverSlowlyTheyAreRead) {
  constexpr std::int32_t kScores = 2000;  // more than the sockets' own buffers take
  TcpTestServer test(with_limits([](auto& limits) { limits.set_max_buffered_bytes(16'384); }));
  RawConnection raw(test.server->port(), 8192);
  raw.shake_hands();
  ASSERT_TRUE(raw.send(scores_frame(1, "one two", kScores)));
  ASSERT_TRUE(raw.generate(2, "other"));
  ASSERT_TRUE(test.service.wait_until([](const auto& now) { return now.done == 2; }));
  // The first request has ended, and its id is taken until its Done is on its way.
  ASSERT_TRUE(raw.generate(1, "again"));
  std::vector<std::string> kinds;
  std::int32_t n_scores = 0;
  int n_done = 0;
  int n_refused = 0;
  while (n_done < 2) {
    const std::optional<v1::Frame> frame = raw.receive();
    ASSERT_TRUE(frame);
    n_done += frame->has_done() ? 1 : 0;
    if (frame->has_error()) {
      EXPECT_EQ(frame->error().param(), "id");
      ++n_refused;
    }
    if (frame->id() != 1 || frame->has_error()) continue;
    if (frame->has_scores()) {
      EXPECT_LE(frame->ByteSizeLong(), 256U << 10U);
      for (const v1::PromptScore& score : frame->scores().scores()) {
        EXPECT_EQ(score.position(), ++n_scores);
        EXPECT_EQ(score.dense_size(), 4096);
      }
      EXPECT_LE(kinds.size(), 1U);  // after Accepted alone
    } else {
      kinds.push_back(frame->has_accepted() ? "accepted" : frame->has_done() ? "done" : "delta");
    }
  }
  EXPECT_EQ(n_scores, kScores);
  EXPECT_EQ(n_refused, 1);
  EXPECT_THAT(kinds, testing::ElementsAre("accepted", "delta", "delta", "delta", "done"));
  // And then the id is free.
  ASSERT_TRUE(raw.generate(1, "ok"));
  const std::optional<v1::Frame> frame = raw.receive();
  EXPECT_TRUE(frame && frame->has_accepted());
}

TEST(TcpSession, OutputBehindScoresIsBounded) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_max_buffered_bytes(32'768); }));
  RawConnection raw(test.server->port(), 8192);
  raw.shake_hands();
  ASSERT_TRUE(raw.send(scores_frame(1, "flood", 600)));
  ASSERT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 1; }));
  std::optional<v1::Frame> frame;
  do {
    frame = raw.receive();
    ASSERT_TRUE(frame);
    EXPECT_FALSE(frame->has_delta());  // what was behind the scores went with them
  } while (!frame->has_error());
  EXPECT_EQ(frame->error().code(), v1::RESOURCE_EXHAUSTED);
  ASSERT_TRUE(raw.generate(2, "ok"));
  frame = raw.receive();
  EXPECT_TRUE(frame && frame->has_accepted());
}

TEST(TcpSession, ScoresOfOneConnectionAreBounded) {
  TcpTestServer test;
  RawConnection raw(test.server->port(), 8192);
  raw.shake_hands();
  ASSERT_TRUE(raw.send(scores_frame(1, "silent", 6000)));  // 96 MiB
  ASSERT_TRUE(raw.send(scores_frame(2, "silent", 3000)));
  ASSERT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 1; }));
  raw.close();
  EXPECT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 2; }));
}

TEST(TcpSession, AScoreLargerThanAFrameEndsItsRequest) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_max_frame_bytes(8192); }));
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.send(scores_frame(1, "silent", 2)));
  std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_error());
  EXPECT_THAT(frame->error().message(), HasSubstr("too large"));
  EXPECT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 1; }));
}

TEST(TcpSession, GoodbyeDropsWaitingScores) {
  TcpTestServer test;
  RawConnection raw(test.server->port(), 8192);
  raw.shake_hands();
  ASSERT_TRUE(raw.send(scores_frame(1, "silent", 600)));
  ASSERT_TRUE(test.service.wait_until([](const auto& now) { return now.started == 1; }));
  raw.send_hello();  // a second one
  EXPECT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 1; }));
  std::optional<v1::Frame> last;
  while (std::optional<v1::Frame> frame = raw.receive()) last = std::move(frame);
  ASSERT_TRUE(last && last->has_error());
  EXPECT_EQ(last->id(), 0U);
}

TEST(TcpSession, SessionsBelongToTheKeyOfTheConnection) {
  TcpServerOptions options;
  options.api_keys = {"alpha", "beta"};
  TcpTestServer test(std::move(options));
  for (const char* key : {"alpha", "beta", "alpha"}) {
    RawConnection raw(test.server->port());
    raw.send_hello(key);
    ASSERT_TRUE(raw.receive());
    ASSERT_TRUE(raw.generate(1, "x"));
    ASSERT_TRUE(raw.receive());
  }
  const std::vector<GenerateRequest> requests = test.service.requests();
  ASSERT_EQ(requests.size(), 3U);
  EXPECT_NE(requests[0].owner, 0U);
  EXPECT_NE(requests[0].owner, requests[1].owner);
  EXPECT_EQ(requests[0].owner, requests[2].owner);
}

}  // namespace
}  // namespace spindle::api
