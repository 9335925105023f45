#include "cluster/api/http_server.h"

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <utility>
#include <vector>

#include "cluster/api/http_session.h"

namespace spindle::api {
namespace asio = boost::asio;
using boost::system::error_code;

namespace {

// Connections over the limit that are told so before they are closed; more are closed at once.
constexpr std::size_t kMaxRefusedConnections = 64;
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

// Shared with the accept loop, so that the loop never looks at a destroyed server.
struct HttpServer::Listener : std::enable_shared_from_this<HttpServer::Listener> {
  Listener(asio::io_context& io_context, CompletionService& service, HttpOptions options)
      : io(io_context),
        acceptor(asio::make_strand(io_context)),
        pause(acceptor.get_executor()),
        context(std::make_shared<HttpSessionContext>(service, std::move(options))) {}

  Status open() {
    const HttpOptions& options = context->handlers.options();
    auto endpoint = resolve_local(io, options.host, options.port);
    if (!endpoint.ok()) return endpoint.status();
    error_code error;
    acceptor.open(endpoint->protocol(), error);
    if (!error) acceptor.set_option(asio::socket_base::reuse_address(true), error);
    if (!error) acceptor.bind(*endpoint, error);
    if (!error) acceptor.listen(asio::socket_base::max_listen_connections, error);
    if (!error) port = acceptor.local_endpoint(error).port();
    if (!error) return ok_status();
    return unavailable("cannot listen on " + options.host + ":" + std::to_string(options.port) +
                       ": " + error.message());
  }

  asio::awaitable<void> accept_loop() {
    while (acceptor.is_open()) {
      asio::ip::tcp::socket socket(asio::make_strand(io));
      error_code error;
      co_await acceptor.async_accept(socket, asio::redirect_error(asio::use_awaitable, error));
      if (!error) {
        start_session(std::move(socket));
      } else if (acceptor.is_open()) {
        pause.expires_after(kAcceptPause);
        co_await pause.async_wait(asio::redirect_error(asio::use_awaitable, error));
      }
    }
  }

  void start_session(asio::ip::tcp::socket socket) {
    const auto limit = static_cast<std::size_t>(std::max(context->limits.max_connections(), 1));
    auto session = std::make_shared<HttpSession>(std::move(socket), context);
    std::size_t n_before = 0;
    {
      const std::lock_guard lock(context->mutex);
      n_before = context->sessions.size();
      // The socket closes with `session`, after the lock.
      if (context->stopped || n_before >= limit + kMaxRefusedConnections) return;
      context->sessions.emplace(session.get(), session);
    }
    if (n_before < limit) {
      session->start();
    } else {
      session->start_refusal();
    }
  }

  asio::io_context& io;
  asio::ip::tcp::acceptor acceptor;
  asio::steady_timer pause;
  const std::shared_ptr<HttpSessionContext> context;
  std::uint16_t port = 0;
};

Result<std::unique_ptr<HttpServer>> HttpServer::listen(asio::io_context& io,
                                                       CompletionService& service,
                                                       HttpOptions options) {
  auto listener = std::make_shared<Listener>(io, service, std::move(options));
  if (Status status = listener->open(); !status.ok()) return status;
  asio::co_spawn(
      listener->acceptor.get_executor(), [listener] { return listener->accept_loop(); },
      asio::detached);
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(listener)));
}

HttpServer::HttpServer(std::shared_ptr<Listener> listener) : listener_(std::move(listener)) {}

HttpServer::~HttpServer() { stop_now(); }

std::uint16_t HttpServer::port() const { return listener_->port; }

std::size_t HttpServer::n_connections() const {
  const std::lock_guard lock(listener_->context->mutex);
  return listener_->context->sessions.size();
}

void HttpServer::stop_gently() { stop(false); }

void HttpServer::stop_now() { stop(true); }

void HttpServer::stop(bool now) {
  HttpSessionContext& context = *listener_->context;
  std::vector<std::shared_ptr<HttpSession>> sessions;
  {
    const std::lock_guard lock(context.mutex);
    context.stopped = true;
    for (const auto& [address, session] : context.sessions) {
      if (auto alive = session.lock()) sessions.push_back(std::move(alive));
    }
  }
  asio::post(listener_->acceptor.get_executor(), [listener = listener_] {
    error_code ignored;
    listener->acceptor.close(ignored);
    listener->pause.cancel();
  });
  for (const std::shared_ptr<HttpSession>& session : sessions) {
    if (now) {
      session->stop_now();
    } else {
      session->stop_gently();
    }
  }
}

bool HttpServer::wait_stopped(Deadline deadline) {
  HttpSessionContext& context = *listener_->context;
  std::unique_lock lock(context.mutex);
  return context.session_ended.wait_until(lock, deadline.at(),
                                          [&context] { return context.sessions.empty(); });
}

}  // namespace spindle::api
