#pragma once
// A blocking HTTP client that says exactly the bytes a test wants, and never waits for ever.

#include <boost/json.hpp>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace spindle::api {

struct TestResponse {
  int status = 0;                              // 0: the connection ended before a whole response
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined

  boost::json::value json() const;
  // The error object's member, or "" when there is none or it is null.
  std::string error(std::string_view member) const;
  // The payloads of the SSE events, comments left out.
  std::vector<std::string> events() const;
};

class HttpTestClient {
 public:
  // receive_buffer_bytes > 0 makes a reader with a small kernel buffer.
  explicit HttpTestClient(std::uint16_t port, int receive_buffer_bytes = 0);
  ~HttpTestClient();
  HttpTestClient(const HttpTestClient&) = delete;
  HttpTestClient& operator=(const HttpTestClient&) = delete;

  // False when the server has closed.
  bool send(std::string_view bytes);
  // The next response on the connection. `has_body`: false for HEAD.
  TestResponse receive(bool has_body = true);
  // Sends a request and receives its response.
  TestResponse get(const std::string& target, const std::string& headers = "");
  TestResponse post(const std::string& target, const std::string& body,
                    const std::string& headers = "");
  // More bytes as they come; empty at the end of the stream or after the time-out.
  std::string read_some();
  // Whether the server closed the connection in time.
  bool closed_by_server();
  void close();
  void set_timeout(std::chrono::milliseconds timeout) { timeout_ = timeout; }

 private:
  bool fill();
  std::string take_line();
  bool take_chunks(std::string& body);

  int socket_ = -1;
  std::string buffer_;
  std::chrono::milliseconds timeout_{10000};
};

std::string post_text(const std::string& target, const std::string& body,
                      const std::string& headers = "");

}  // namespace spindle::api
