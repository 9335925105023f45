// The event stream of the state, end to end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "tests/cluster/api/api_test_server.h"
#include "tests/cluster/api/http_test_client.h"

namespace spindle::api {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr const char* kGetEvents = "GET /v1/spindle/events HTTP/1.1\r\nHost: x\r\n\r\n";

ApiTestOptions every(milliseconds interval, std::size_t max_streams = 32) {
  ApiTestOptions options;
  options.state_interval_ms = interval.count();
  options.max_state_streams = max_streams;
  options.api_keys = {"sk-test"};
  return options;
}

// Reads until `n` states have come; "" when they do not come in time.
std::string read_states(HttpTestClient& client, std::size_t n) {
  std::string text;
  std::size_t found = 0;
  while (found < n) {
    const std::string more = client.read_some();
    if (more.empty()) return "";
    text += more;
    found = 0;
    for (std::size_t at = text.find("event: state\n"); at != std::string::npos;
         at = text.find("event: state\n", at + 1)) {
      ++found;
    }
  }
  return text;
}

TEST(HttpEvents, SendsTheStateAtOnceAndAgain) {
  ApiTestServer server(every(milliseconds(50)));
  HttpTestClient client(server.port());
  client.send(kGetEvents);  // without the key
  const std::string text = read_states(client, 3);
  EXPECT_THAT(text, HasSubstr("200 OK"));
  EXPECT_THAT(text, HasSubstr("Content-Type: text/event-stream"));
  EXPECT_THAT(text, HasSubstr("retry: 10000\n\n"));
  EXPECT_THAT(text, HasSubstr("event: state\ndata: {\"model\":\"spindle-mini\""));
}

TEST(HttpEvents, ShowsWhatChanged) {
  ApiTestServer server(every(milliseconds(20)));
  HttpTestClient client(server.port());
  client.send(kGetEvents);
  ASSERT_THAT(read_states(client, 1), HasSubstr("\"draining\":false"));
  server.engine().set_draining(true);
  const std::string text = read_states(client, 3);
  EXPECT_THAT(text, HasSubstr("\"draining\":true"));
}

TEST(HttpEvents, BoundsTheStreams) {
  ApiTestServer server(every(milliseconds(20), 1));
  HttpTestClient first(server.port());
  first.send(kGetEvents);
  ASSERT_NE(read_states(first, 1), "");
  HttpTestClient second(server.port());
  const TestResponse refused = second.get("/v1/spindle/events");
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.error("code"), "server_is_overloaded");
  EXPECT_EQ(refused.headers.at("retry-after"), "10");
  EXPECT_EQ(second.get("/live").status, 200);  // everything else still works
  // A reader that goes makes room, though nothing of it is read any more.
  first.close();
  const Deadline deadline = Deadline::after_ms(10000);
  std::string text;
  while (text.find("200 OK") == std::string::npos && !deadline.passed()) {
    HttpTestClient third(server.port());
    third.send(kGetEvents);
    text = third.read_some();
  }
  EXPECT_THAT(text, HasSubstr("200 OK"));
}

TEST(HttpEvents, EndWithTheServer) {
  ApiTestServer server(every(milliseconds(3600 * 1000)));  // it waits when the stop comes
  HttpTestClient client(server.port());
  client.send(kGetEvents);
  ASSERT_NE(read_states(client, 1), "");
  server.server().stop_gently();
  EXPECT_TRUE(server.server().wait_stopped(Deadline::after_ms(10000)));
  // The body was ended, not cut.
  std::string rest;
  for (std::string more = client.read_some(); !more.empty(); more = client.read_some())
    rest += more;
  EXPECT_THAT(rest, ::testing::EndsWith("0\r\n\r\n"));
}

TEST(HttpEvents, DropAReaderThatStalls) {
  ApiTestOptions options = every(milliseconds(1));
  options.limits.set_write_timeout_ms(200);
  options.limits.set_max_buffered_bytes(4096);
  ApiTestServer server(options);
  HttpTestClient client(server.port(), /*receive_buffer_bytes=*/4096);
  client.send(kGetEvents);
  const Deadline deadline = Deadline::after_ms(20000);
  while (server.server().n_connections() > 0 && !deadline.passed()) {
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_EQ(server.server().n_connections(), 0u);
}

TEST(HttpEvents, AnswersHeadAndOldClients) {
  ApiTestServer server(every(milliseconds(20)));
  HttpTestClient client(server.port());
  client.send("HEAD /v1/spindle/events HTTP/1.1\r\nHost: x\r\n\r\n");
  const TestResponse head = client.receive(/*has_body=*/false);
  EXPECT_EQ(head.status, 200);
  EXPECT_THAT(head.headers.at("content-type"), HasSubstr("text/event-stream"));
  EXPECT_EQ(client.get("/live").status, 200);

  HttpTestClient old(server.port());
  old.send("GET /v1/spindle/events HTTP/1.0\r\n\r\n");
  const std::string text = read_states(old, 2);
  EXPECT_THAT(text, Not(HasSubstr("Transfer-Encoding")));
  EXPECT_THAT(text, HasSubstr("event: state\ndata: {"));
}

}  // namespace
}  // namespace spindle::api
