#include "tests/cluster/api/http_test_client.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>

#include "kernels/core/check.h"

namespace spindle::api {
namespace json = boost::json;

json::value TestResponse::json() const {
  boost::system::error_code error;
  json::value value = json::parse(body, error);
  return error ? json::value("not JSON: " + body) : value;
}

std::string TestResponse::error(std::string_view member) const {
  const json::value value = json();
  const json::value* found = value.is_object() ? value.get_object().if_contains("error") : nullptr;
  if (found == nullptr || !found->is_object()) return "";
  const json::value* text =
      found->get_object().if_contains(json::string_view(member.data(), member.size()));
  return text != nullptr && text->is_string() ? std::string(text->get_string()) : "";
}

std::vector<std::string> TestResponse::events() const {
  std::vector<std::string> events;
  std::size_t begin = 0;
  while (begin < body.size()) {
    const std::size_t end = std::min(body.find("\n\n", begin), body.size());
    const std::string event = body.substr(begin, end - begin);
    if (event.starts_with("data: ")) events.push_back(event.substr(6));
    begin = end + 2;
  }
  return events;
}

HttpTestClient::HttpTestClient(std::uint16_t port, int receive_buffer_bytes) {
  socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(socket_ >= 0, "no socket");
  if (receive_buffer_bytes > 0) {
    ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes,
                 sizeof(receive_buffer_bytes));
  }
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  CHECK(::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0,
        "cannot connect");
}

HttpTestClient::~HttpTestClient() { close(); }

void HttpTestClient::close() {
  if (socket_ >= 0) ::close(socket_);
  socket_ = -1;
}

bool HttpTestClient::send(std::string_view bytes) {
  while (!bytes.empty()) {
    pollfd ready{socket_, POLLOUT, 0};
    if (::poll(&ready, 1, static_cast<int>(timeout_.count())) != 1) return false;
    const ssize_t n = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  return true;
}

std::string HttpTestClient::read_some() {
  if (!buffer_.empty()) return std::exchange(buffer_, {});
  fill();
  return std::exchange(buffer_, {});
}

bool HttpTestClient::fill() {
  pollfd ready{socket_, POLLIN, 0};
  if (::poll(&ready, 1, static_cast<int>(timeout_.count())) != 1) return false;
  std::array<char, 16384> bytes;
  const ssize_t n = ::recv(socket_, bytes.data(), bytes.size(), 0);
  if (n <= 0) return false;
  buffer_.append(bytes.data(), static_cast<std::size_t>(n));
  return true;
}

bool HttpTestClient::closed_by_server() {
  const auto end = std::chrono::steady_clock::now() + timeout_;
  while (std::chrono::steady_clock::now() < end) {
    pollfd ready{socket_, POLLIN, 0};
    if (::poll(&ready, 1, static_cast<int>(timeout_.count())) != 1) return false;
    std::array<char, 4096> bytes;
    const ssize_t n = ::recv(socket_, bytes.data(), bytes.size(), 0);
    if (n <= 0) return true;
  }
  return false;
}

std::string HttpTestClient::take_line() {
  for (;;) {
    const std::size_t end = buffer_.find("\r\n");
    if (end != std::string::npos) {
      std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end + 2);
      return line;
    }
    if (!fill()) return "";
  }
}

bool HttpTestClient::take_chunks(std::string& body) {
  for (;;) {
    const std::string size_line = take_line();
    if (size_line.empty()) return false;
    const std::size_t size = std::stoul(size_line, nullptr, 16);
    while (buffer_.size() < size + 2) {
      if (!fill()) return false;
    }
    body.append(buffer_, 0, size);
    buffer_.erase(0, size + 2);
    if (size == 0) return true;
  }
}

TestResponse HttpTestClient::receive(bool has_body) {
  TestResponse response;
  const std::string status_line = take_line();
  if (!status_line.starts_with("HTTP/1.")) return response;
  for (std::string line = take_line(); !line.empty(); line = take_line()) {
    const std::size_t colon = line.find(": ");
    if (colon == std::string::npos) return response;
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    response.headers[name] = line.substr(colon + 2);
  }
  bool whole = true;
  if (has_body && response.headers.contains("transfer-encoding")) {
    whole = take_chunks(response.body);
  } else if (has_body && response.headers.contains("content-length")) {
    const std::size_t size = std::stoul(response.headers["content-length"]);
    while (buffer_.size() < size && fill()) {
    }
    whole = buffer_.size() >= size;
    response.body = buffer_.substr(0, size);
    buffer_.erase(0, size);
  }
  if (whole) response.status = std::stoi(status_line.substr(9, 3));
  return response;
}

std::string post_text(const std::string& target, const std::string& body,
                      const std::string& headers) {
  return "POST " + target + " HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n" +
         headers + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

TestResponse HttpTestClient::get(const std::string& target, const std::string& headers) {
  send("GET " + target + " HTTP/1.1\r\nHost: test\r\n" + headers + "\r\n");
  return receive();
}

TestResponse HttpTestClient::post(const std::string& target, const std::string& body,
                                  const std::string& headers) {
  send(post_text(target, body, headers));
  return receive();
}

}  // namespace spindle::api
