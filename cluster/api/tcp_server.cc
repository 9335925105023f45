#include "cluster/api/tcp_server.h"

#include <algorithm>
#include <utility>

#include "cluster/api/listener.h"
#include "cluster/api/tcp_session.h"
#include "kernels/core/check.h"

namespace spindle::api {
namespace asio = boost::asio;

namespace {

constexpr std::int64_t kConnectionRetryMs = 1000;

void start_session(const std::shared_ptr<TcpSessionContext>& context,
                   asio::ip::tcp::socket socket) {
  const auto limit =
      static_cast<std::size_t>(std::max(context->options.limits.max_connections(), 1));
  const auto session = std::make_shared<TcpSession>(std::move(socket), context);
  switch (context->sessions.add(session, limit)) {
    case Admission::kServed:
      session->start();
      break;
    case Admission::kRefused:
      session->start(ApiError{
          resource_exhausted("the server has " + std::to_string(limit) + " connections already"),
          "", kConnectionRetryMs});
      break;
    case Admission::kClosed:
      break;
  }
}

}  // namespace

Result<std::unique_ptr<TcpServer>> TcpServer::listen(asio::io_context& io, TcpServerOptions options,
                                                     TcpServerHooks hooks) {
  CHECK(hooks.start && hooks.stats && hooks.drain, "a TCP server needs all its hooks");
  auto context = std::make_shared<TcpSessionContext>(std::move(options), std::move(hooks));
  const TcpServerOptions& kept = context->options;
  auto listener = Listener::open(io, kept.host, kept.port, [context](asio::ip::tcp::socket socket) {
    start_session(context, std::move(socket));
  });
  if (!listener.ok()) return listener.status();
  (*listener)->start();
  return std::unique_ptr<TcpServer>(new TcpServer(*std::move(listener), std::move(context)));
}

TcpServer::TcpServer(std::shared_ptr<Listener> listener, std::shared_ptr<TcpSessionContext> context)
    : listener_(std::move(listener)), context_(std::move(context)) {}

TcpServer::~TcpServer() { stop(); }

std::uint16_t TcpServer::port() const { return listener_->port(); }

std::size_t TcpServer::n_connections() const { return context_->sessions.size(); }

void TcpServer::stop() {
  const auto sessions = context_->sessions.stop();
  listener_->close();
  for (const auto& session : sessions) session->stop();
}

bool TcpServer::wait_stopped(Deadline deadline) { return context_->sessions.wait_empty(deadline); }

}  // namespace spindle::api
