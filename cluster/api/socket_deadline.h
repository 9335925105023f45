#pragma once
// A deadline for whatever a socket is doing.

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstdint>
#include <memory>

namespace spindle::api {

// When an armed deadline passes, all operations of the socket are cancelled, and passed() is true
// until it is armed again. The socket stays open, so that an answer can still be written.
//
// The owner must outlive its last armed deadline; `owner` keeps it alive until then. Thread-safety:
// none; all on the socket's executor.
class SocketDeadline {
 public:
  explicit SocketDeadline(boost::asio::ip::tcp::socket& socket)
      : socket_(socket), timer_(socket.get_executor()) {}

  void arm(std::int64_t wait_ms, std::weak_ptr<void> owner) {
    passed_ = false;
    const std::uint64_t turn = ++turn_;
    timer_.expires_after(std::chrono::milliseconds(wait_ms));
    timer_.async_wait([this, turn, owner = std::move(owner)](boost::system::error_code error) {
      const auto alive = owner.lock();
      // A timer that fired just before it was armed again still arrives here.
      if (error || !alive || turn != turn_) return;
      passed_ = true;
      boost::system::error_code ignored;
      socket_.cancel(ignored);
    });
  }
  void disarm() {
    ++turn_;
    timer_.cancel();
  }
  bool passed() const { return passed_; }

 private:
  boost::asio::ip::tcp::socket& socket_;
  boost::asio::steady_timer timer_;
  std::uint64_t turn_ = 0;
  bool passed_ = false;
};

}  // namespace spindle::api
