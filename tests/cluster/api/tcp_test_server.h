#pragma once
// A TcpServer over a ScriptedService with its own I/O threads, and a raw client that can send what
// no honest client would.

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <array>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cluster/api/framing.h"
#include "cluster/api/tcp_server.h"
#include "tests/cluster/api/tcp_scripted_service.h"

namespace spindle::api {

inline TcpServerOptions with_limits(const std::function<void(config::Limits&)>& change) {
  TcpServerOptions options;
  change(options.limits);
  return options;
}

class TcpTestServer {
 public:
  explicit TcpTestServer(TcpServerOptions options = {}) {
    options.port = 0;
    options.server_version = "9.9.9";
    options.model = "scripted";
    options.max_model_len = 4096;
    options.n_stages = 2;
    Result<std::unique_ptr<TcpServer>> listening =
        TcpServer::listen(io_, std::move(options), service.hooks());
    EXPECT_TRUE(listening.ok()) << listening.status().to_string();
    server = std::move(listening).value();
    for (int i = 0; i < 2; ++i) {
      threads_.emplace_back([this] { io_.run(); });
    }
  }

  ~TcpTestServer() {
    server->stop();
    EXPECT_TRUE(server->wait_stopped(Deadline::after_ms(20'000))) << "sessions are left";
    work_.reset();
    io_.stop();
    for (std::thread& thread : threads_) thread.join();
  }

  ScriptedService service;

 private:
  boost::asio::io_context io_;
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_{
      io_.get_executor()};
  std::vector<std::thread> threads_;

 public:
  // Its sockets belong to io_.
  std::unique_ptr<TcpServer> server;
};

// Blocking, with a receive timeout of 10 s.
class RawConnection {
 public:
  explicit RawConnection(std::uint16_t port, int receive_buffer_bytes = 0)
      : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (receive_buffer_bytes > 0) {
      ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof receive_buffer_bytes);
    }
    const timeval timeout{.tv_sec = 10, .tv_usec = 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  ~RawConnection() { close(); }
  RawConnection(const RawConnection&) = delete;
  RawConnection& operator=(const RawConnection&) = delete;

  void close() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }

  // False when the server has closed the connection.
  bool send_bytes(const std::string& bytes) {
    std::size_t sent = 0;
    while (sent < bytes.size()) {
      const ssize_t n = ::send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (n <= 0) return false;
      sent += static_cast<std::size_t>(n);
    }
    return true;
  }

  bool send(const v1::Frame& frame) {
    std::string bytes;
    EXPECT_TRUE(append_frame(frame, kDefaultMaxFrameBytes, bytes).ok());
    return send_bytes(bytes);
  }

  // Nothing at the connection's end; a test failure when nothing comes for 10 s.
  std::optional<v1::Frame> receive() {
    for (;;) {
      Result<std::optional<v1::Frame>> frame = decoder_.next();
      EXPECT_TRUE(frame.ok()) << frame.status().to_string();
      if (!frame.ok() || frame->has_value()) return frame.ok() ? *frame : std::nullopt;
      std::array<char, 65536> bytes;
      const ssize_t n = ::recv(fd_, bytes.data(), bytes.size(), 0);
      EXPECT_FALSE(n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) << "nothing came in 10 s";
      if (n <= 0) return std::nullopt;
      decoder_.feed({bytes.data(), static_cast<std::size_t>(n)});
    }
  }

  void send_hello(const std::string& key = "", std::uint32_t major = kProtocolMajor,
                  std::uint32_t minor = kProtocolMinor) {
    v1::Frame frame;
    frame.mutable_hello()->mutable_version()->set_major(major);
    frame.mutable_hello()->mutable_version()->set_minor(minor);
    frame.mutable_hello()->set_api_key(key);
    send(frame);
  }

  // Hello and its Welcome.
  void shake_hands() {
    send_hello();
    const std::optional<v1::Frame> reply = receive();
    ASSERT_TRUE(reply && reply->has_welcome());
  }

  bool generate(std::uint64_t id, const std::string& text) {
    v1::Frame frame;
    frame.set_id(id);
    frame.mutable_generate()->set_text(text);
    return send(frame);
  }

  // The next frame is an Error with id 0, and then the connection ends.
  v1::Error expect_goodbye() {
    const std::optional<v1::Frame> frame = receive();
    EXPECT_TRUE(frame && frame->has_error() && frame->id() == 0)
        << (frame ? frame->ShortDebugString() : "the connection ended without an Error");
    EXPECT_FALSE(receive().has_value()) << "the connection stayed open";
    return frame ? frame->error() : v1::Error();
  }

 private:
  int fd_;
  FrameDecoder decoder_{kDefaultMaxFrameBytes};
};

}  // namespace spindle::api
