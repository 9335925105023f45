#pragma once
// A listening socket that hands every connection to a server.

#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "kernels/core/status.h"

namespace spindle::api {

// The io_context must outlive it and be run by somebody. The accept loop keeps it alive until
// close(), so that the loop never looks at a destroyed server.
//
// Thread-safety: start() once, from one thread; close() and port() from any thread.
class Listener : public std::enable_shared_from_this<Listener> {
 public:
  // The socket's executor is a strand of its own. Called on the listener's strand, so one at a
  // time.
  using OnConnection = std::function<void(boost::asio::ip::tcp::socket)>;

  // Binds to an address or a name of this host; port 0 is any free one. UNAVAILABLE when the
  // address is taken, INVALID_ARGUMENT when it is not one of this host.
  static Result<std::shared_ptr<Listener>> open(boost::asio::io_context& io,
                                                const std::string& host, std::uint16_t port,
                                                OnConnection on_connection);

  void start();
  void close();  // again: nothing
  std::uint16_t port() const { return port_; }

 private:
  Listener(boost::asio::io_context& io, OnConnection on_connection);
  Status bind(const std::string& host, std::uint16_t port);
  boost::asio::awaitable<void> accept_loop();

  boost::asio::io_context& io_;
  const OnConnection on_connection_;
  boost::asio::ip::tcp::acceptor acceptor_;
  boost::asio::steady_timer pause_;
  std::uint16_t port_ = 0;
  std::atomic<bool> closed_{false};
};

}  // namespace spindle::api
