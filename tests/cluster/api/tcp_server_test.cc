#include "cluster/api/tcp_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>

#include "tests/cluster/api/tcp_test_server.h"

namespace spindle::api {
namespace {

using testing::HasSubstr;

std::string header(std::uint32_t length) {
  std::string bytes;
  for (unsigned i = 0; i < 4; ++i) bytes.push_back(static_cast<char>(length >> (8 * i)));
  return bytes;
}

TEST(TcpServer, WelcomeTellsWhatIsServed) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.send_hello();
  const std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_welcome());
  EXPECT_EQ(frame->id(), 0U);
  EXPECT_EQ(frame->welcome().version().major(), kProtocolMajor);
  EXPECT_EQ(frame->welcome().server_version(), "9.9.9");
  EXPECT_EQ(frame->welcome().model(), "scripted");
  EXPECT_EQ(frame->welcome().max_model_len(), 4096);
  EXPECT_EQ(frame->welcome().n_stages(), 2);
}

TEST(TcpServer, FramesOfARequest) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(7, "one two"));
  std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  EXPECT_EQ(frame->id(), 7U);
  EXPECT_EQ(frame->accepted().prompt_tokens(), 2);
  EXPECT_THAT(frame->accepted().request_id(), HasSubstr("tcp-"));
  std::string text;
  v1::Delta last;
  while ((frame = raw.receive()) && frame->has_delta()) {
    EXPECT_EQ(frame->id(), 7U);
    last = frame->delta();
    text += last.text();
  }
  EXPECT_EQ(text, "one two");
  EXPECT_EQ(last.finish_reason(), v1::STOP);
  EXPECT_EQ(last.stop_reason(), "2");
  ASSERT_TRUE(frame && frame->has_done());
  EXPECT_EQ(frame->done().usage().completion_tokens(), 2);
  EXPECT_EQ(frame->done().usage().kv_size(), 2);
  EXPECT_EQ(frame->done().usage().kv(1).kept_bytes(), 1024U);
  // The id is free again.
  ASSERT_TRUE(raw.generate(7, "again"));
  frame = raw.receive();
  EXPECT_TRUE(frame && frame->has_accepted());
}

TEST(TcpServer, RequestFieldsReachTheService) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  v1::Frame frame;
  frame.set_id(1);
  v1::GenerateRequest& request = *frame.mutable_generate();
  request.set_model("m");
  request.set_request_id("mine-1");
  v1::ChatMessage& message = *request.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("hello");
  v1::SamplingParams& sampling = *request.mutable_sampling();
  sampling.set_max_tokens(0);  // set to zero is not the same as unset
  sampling.set_temperature(0.5F);
  sampling.set_seed(0xFFFFFFFFFFFFFFFFU);
  (*sampling.mutable_logit_bias())[9] = 1.5F;
  (*sampling.mutable_logit_bias())[3] = -2.0F;
  sampling.add_stop("END");
  sampling.add_stop_token_ids(42);
  sampling.set_skip_special_tokens(false);
  ASSERT_TRUE(raw.send(frame));
  std::optional<v1::Frame> reply = raw.receive();
  ASSERT_TRUE(reply && reply->has_accepted()) << reply->ShortDebugString();
  EXPECT_EQ(reply->accepted().request_id(), "mine-1");

  const GenerateRequest got = test.service.requests().at(0);
  EXPECT_EQ(got.model, "m");
  EXPECT_EQ(got.request_id, "mine-1");
  EXPECT_EQ(got.sampling.max_tokens, 0);
  EXPECT_EQ(got.sampling.temperature, 0.5);
  EXPECT_FALSE(got.sampling.top_k.has_value());
  EXPECT_FALSE(got.sampling.n.has_value());
  EXPECT_EQ(got.sampling.seed, 0xFFFFFFFFFFFFFFFFU);
  EXPECT_EQ(got.sampling.logit_bias,
            (std::vector<std::pair<std::int64_t, double>>{{3, -2.0}, {9, 1.5}}));
  EXPECT_EQ(got.sampling.stop, std::vector<std::string>{"END"});
  EXPECT_EQ(got.sampling.stop_token_ids, std::vector<std::int64_t>{42});
  EXPECT_FALSE(got.sampling.skip_special_tokens);
  EXPECT_FALSE(got.sampling.ignore_eos);
  EXPECT_EQ(boost::json::serialize(std::get<ChatPrompt>(got.prompt).messages),
            R"([{"role":"user","content":"hello"}])");
}

TEST(TcpServer, ErrorsOfARequestKeepTheConnection) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();

  ASSERT_TRUE(raw.generate(1, "invalid"));
  std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_error());
  EXPECT_EQ(frame->id(), 1U);
  EXPECT_EQ(frame->error().code(), v1::INVALID_ARGUMENT);
  EXPECT_EQ(frame->error().param(), "sampling.top_p");

  ASSERT_TRUE(raw.generate(2, "refuse"));
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_error());
  EXPECT_EQ(frame->error().code(), v1::RESOURCE_EXHAUSTED);
  EXPECT_EQ(frame->error().retry_after_ms(), 250);

  v1::Frame no_prompt;
  no_prompt.set_id(3);
  no_prompt.mutable_generate();
  ASSERT_TRUE(raw.send(no_prompt));
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_error());
  EXPECT_EQ(frame->error().param(), "prompt");

  v1::Frame bad_id;
  bad_id.set_id(4);
  bad_id.mutable_generate()->set_text("x");
  bad_id.mutable_generate()->set_request_id("line\nbreak");
  ASSERT_TRUE(raw.send(bad_id));
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_error());
  EXPECT_EQ(frame->error().param(), "request_id");

  ASSERT_TRUE(raw.generate(5, "fail"));
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_delta());
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_error());
  EXPECT_EQ(frame->error().code(), v1::INTERNAL);
  EXPECT_EQ(test.service.counts().started, 3);
}

TEST(TcpServer, UnknownBodyIsAnErrorForItsId) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  v1::Frame frame;
  frame.set_id(9);
  frame.mutable_done();  // known, but not a client's to send
  ASSERT_TRUE(raw.send(frame));
  std::optional<v1::Frame> reply = raw.receive();
  ASSERT_TRUE(reply && reply->has_error());
  EXPECT_EQ(reply->id(), 9U);
  EXPECT_EQ(reply->error().code(), v1::UNIMPLEMENTED);
  // Field 15, a newer client's body.
  ASSERT_TRUE(raw.send_bytes(header(4) + "\x08\x0A\x7A" + std::string(1, '\0')));
  reply = raw.receive();
  ASSERT_TRUE(reply && reply->has_error());
  EXPECT_EQ(reply->id(), 10U);
  v1::Frame empty;
  ASSERT_TRUE(raw.send(empty));
  EXPECT_EQ(raw.expect_goodbye().code(), v1::UNIMPLEMENTED);
}

TEST(TcpServer, NoHello) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  ASSERT_TRUE(raw.generate(1, "hi"));
  EXPECT_EQ(raw.expect_goodbye().code(), v1::INVALID_ARGUMENT);
  EXPECT_EQ(test.service.counts().started, 0);
}

TEST(TcpServer, SecondHello) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  raw.send_hello();
  EXPECT_EQ(raw.expect_goodbye().code(), v1::INVALID_ARGUMENT);
}

TEST(TcpServer, WrongVersion) {
  TcpTestServer test;
  for (const auto& [major, minor] : std::vector<std::pair<std::uint32_t, std::uint32_t>>{
           {0, 0}, {kProtocolMajor + 1, 0}, {kProtocolMajor, kProtocolMinor + 1}}) {
    RawConnection raw(test.server->port());
    raw.send_hello("", major, minor);
    const v1::Error error = raw.expect_goodbye();
    EXPECT_EQ(error.code(), v1::UNIMPLEMENTED);
    EXPECT_EQ(error.param(), "hello.version");
    EXPECT_THAT(error.message(), HasSubstr("this server speaks " + std::to_string(kProtocolMajor) +
                                           "." + std::to_string(kProtocolMinor)));
  }
}

TEST(TcpServer, OlderMinorVersionsAreWelcome) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.send_hello("", kProtocolMajor, 0);
  const std::optional<v1::Frame> reply = raw.receive();
  EXPECT_TRUE(reply && reply->has_welcome());
}

TEST(TcpServer, ApiKeys) {
  TcpServerOptions options;
  options.api_keys = {"first", "second"};
  TcpTestServer test(options);
  for (const std::string key : {"", "firs", "first ", "third"}) {
    RawConnection raw(test.server->port());
    raw.send_hello(key);
    const v1::Error error = raw.expect_goodbye();
    EXPECT_EQ(error.code(), v1::UNAUTHENTICATED) << key;
    EXPECT_EQ(error.param(), "hello.api_key");
  }
  for (const std::string key : {"first", "second"}) {
    RawConnection raw(test.server->port());
    raw.send_hello(key);
    const std::optional<v1::Frame> frame = raw.receive();
    EXPECT_TRUE(frame && frame->has_welcome()) << key;
  }
}

TEST(TcpServer, OversizeFrame) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_max_frame_bytes(1000); }));
  {
    RawConnection raw(test.server->port());
    raw.shake_hands();
    ASSERT_TRUE(raw.generate(1, std::string(900, 'x')));
    const std::optional<v1::Frame> frame = raw.receive();
    ASSERT_TRUE(frame && frame->has_accepted());
  }
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.send_bytes(header(1001)));
  EXPECT_EQ(raw.expect_goodbye().code(), v1::TOO_LARGE);
}

TEST(TcpServer, BeforeTheKeyOnlySmallFrames) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  ASSERT_TRUE(raw.send_bytes(header(1U << 20U)));
  EXPECT_EQ(raw.expect_goodbye().code(), v1::TOO_LARGE);
}

TEST(TcpServer, HalfAFrameThenSilence) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_read_timeout_ms(300); }));
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "silent"));
  const std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  ASSERT_TRUE(raw.send_bytes(header(100) + "abc"));
  EXPECT_EQ(raw.expect_goodbye().code(), v1::DEADLINE_EXCEEDED);
  EXPECT_TRUE(test.service.wait_until([](const auto& now) { return now.cancelled == 1; }));
}

TEST(TcpServer, SilenceInsteadOfHello) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_read_timeout_ms(300); }));
  RawConnection raw(test.server->port());
  EXPECT_EQ(raw.expect_goodbye().code(), v1::DEADLINE_EXCEEDED);
}

// A byte now and then does not extend the time for a frame.
TEST(TcpServer, DrippedFrame) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_read_timeout_ms(300); }));
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.send_bytes(header(10'000)));
  for (int i = 0; i < 25; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ASSERT_TRUE(raw.send_bytes("x"));  // the server discards for a second after its goodbye
  }
  EXPECT_EQ(raw.expect_goodbye().code(), v1::DEADLINE_EXCEEDED);
}

TEST(TcpServer, IdleConnectionsLiveByPing) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_idle_timeout_ms(800); }));
  RawConnection raw(test.server->port());
  raw.shake_hands();
  v1::Frame ping;
  ping.set_id(3);
  ping.mutable_ping();
  for (int i = 0; i < 6; ++i) {  // longer than the timeout
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    ASSERT_TRUE(raw.send(ping));
    const std::optional<v1::Frame> frame = raw.receive();
    ASSERT_TRUE(frame && frame->has_pong()) << frame->ShortDebugString();
    EXPECT_EQ(frame->id(), 3U);
  }
  const v1::Error error = raw.expect_goodbye();
  EXPECT_EQ(error.code(), v1::DEADLINE_EXCEEDED);
  EXPECT_THAT(error.message(), HasSubstr("Ping"));
}

TEST(TcpServer, RunningRequestIsNotIdle) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_idle_timeout_ms(100); }));
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(1, "silent"));
  std::optional<v1::Frame> frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_accepted());
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  frame = v1::Frame();
  frame->set_id(1);
  frame->mutable_cancel();
  ASSERT_TRUE(raw.send(*frame));
  frame = raw.receive();
  ASSERT_TRUE(frame && frame->has_error());
  EXPECT_EQ(frame->error().code(), v1::CANCELLED_BY_CLIENT);
  EXPECT_EQ(raw.expect_goodbye().code(), v1::DEADLINE_EXCEEDED);  // idle from now on
}

TEST(TcpServer, GarbageIsAnsweredAndClosed) {
  TcpTestServer test(with_limits([](auto& limits) { limits.set_read_timeout_ms(300); }));
  constexpr unsigned kSeed = 7;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  for (int round = 0; round < 60; ++round) {
    RawConnection raw(test.server->port());
    const bool after_hello = round % 2 == 0;
    if (after_hello) raw.shake_hands();
    std::string bytes(1 + random() % 200, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    if (round % 3 != 0) bytes = header(static_cast<std::uint32_t>(bytes.size())) + bytes;
    if (round % 5 == 0) bytes[4] = '\xFF';
    raw.send_bytes(bytes);
    // Whatever came before, the last frame is an Error.
    std::optional<v1::Frame> frame;
    std::optional<v1::Frame> last;
    while ((frame = raw.receive())) {
      last = frame;
      if (frame->id() != 0) raw.send_bytes(header(0xFFFFFFFFU));
    }
    ASSERT_TRUE(last && last->has_error()) << "round " << round;
    EXPECT_NE(last->error().code(), v1::INTERNAL);
  }
  RawConnection raw(test.server->port());
  raw.shake_hands();
}

TEST(TcpServer, DuplicateIdIsRefusedAndTheFirstGoesOn) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(5, "slow"));
  ASSERT_TRUE(raw.generate(5, "again"));
  bool refused = false;
  int n_deltas_after = 0;
  while (n_deltas_after < 3) {
    const std::optional<v1::Frame> frame = raw.receive();
    ASSERT_TRUE(frame);
    ASSERT_EQ(frame->id(), 5U);
    if (frame->has_error()) {
      EXPECT_EQ(frame->error().code(), v1::INVALID_ARGUMENT);
      EXPECT_EQ(frame->error().param(), "id");
      refused = true;
    } else if (refused) {
      n_deltas_after += frame->has_delta() ? 1 : 0;
    }
  }
  EXPECT_EQ(test.service.counts().started, 1);
  EXPECT_EQ(test.service.counts().cancelled, 0);
}

TEST(TcpServer, RequestIdZeroEndsTheConnection) {
  TcpTestServer test;
  RawConnection raw(test.server->port());
  raw.shake_hands();
  ASSERT_TRUE(raw.generate(0, "hi"));
  EXPECT_EQ(raw.expect_goodbye().param(), "id");
}

}  // namespace
}  // namespace spindle::api
