#include "cluster/api/listener.h"

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <utility>

namespace spindle::api {
namespace asio = boost::asio;
using boost::system::error_code;

namespace {

// After accept() failed, e.g. for want of file descriptors.
constexpr std::chrono::milliseconds kAcceptPause{100};

Result<asio::ip::tcp::endpoint> resolve_local(asio::io_context& io, const std::string& host,
                                              std::uint16_t port) {
  error_code error;
  const asio::ip::address address = asio::ip::make_address(host, error);
  if (!error) return asio::ip::tcp::endpoint(address, port);
  asio::ip::tcp::resolver resolver(io);
  const auto found = resolver.resolve(host, std::to_string(port), error);
  if (error || found.empty()) {
    return invalid_argument("cannot listen on " + host + ": not an address of this host");
  }
  return found.begin()->endpoint();
}

}  // namespace

Result<std::shared_ptr<Listener>> Listener::open(asio::io_context& io, const std::string& host,
                                                 std::uint16_t port, OnConnection on_connection) {
  std::shared_ptr<Listener> listener(new Listener(io, std::move(on_connection)));
  if (Status status = listener->bind(host, port); !status.ok()) return status;
  return listener;
}

Listener::Listener(asio::io_context& io, OnConnection on_connection)
    : io_(io),
      on_connection_(std::move(on_connection)),
      acceptor_(asio::make_strand(io)),
      pause_(acceptor_.get_executor()) {}

Status Listener::bind(const std::string& host, std::uint16_t port) {
  auto endpoint = resolve_local(io_, host, port);
  if (!endpoint.ok()) return endpoint.status();
  error_code error;
  acceptor_.open(endpoint->protocol(), error);
  if (!error) acceptor_.set_option(asio::socket_base::reuse_address(true), error);
  if (!error) acceptor_.bind(*endpoint, error);
  if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
  if (!error) port_ = acceptor_.local_endpoint(error).port();
  if (!error) return ok_status();
  return unavailable("cannot listen on " + host + ":" + std::to_string(port) + ": " +
                     error.message());
}

void Listener::start() {
  asio::co_spawn(
      acceptor_.get_executor(), [self = shared_from_this()] { return self->accept_loop(); },
      asio::detached);
}

void Listener::close() {
  if (closed_.exchange(true)) return;
  asio::post(acceptor_.get_executor(), [self = shared_from_this()] {
    error_code ignored;
    self->acceptor_.close(ignored);
    self->pause_.cancel();
  });
}

asio::awaitable<void> Listener::accept_loop() {
  while (acceptor_.is_open()) {
    asio::ip::tcp::socket socket(asio::make_strand(io_));
    error_code error;
    co_await acceptor_.async_accept(socket, asio::redirect_error(asio::use_awaitable, error));
    if (!error) {
      on_connection_(std::move(socket));
    } else if (acceptor_.is_open()) {
      pause_.expires_after(kAcceptPause);
      co_await pause_.async_wait(asio::redirect_error(asio::use_awaitable, error));
    }
  }
}

}  // namespace spindle::api
