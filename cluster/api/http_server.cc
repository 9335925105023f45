#include "cluster/api/http_server.h"

#include <algorithm>
#include <utility>

#include "cluster/api/http_session.h"
#include "cluster/api/listener.h"

namespace spindle::api {
namespace asio = boost::asio;

namespace {

void start_session(const std::shared_ptr<HttpSessionContext>& context,
                   asio::ip::tcp::socket socket) {
  const auto limit = static_cast<std::size_t>(std::max(context->limits.max_connections(), 1));
  const auto session = std::make_shared<HttpSession>(std::move(socket), context);
  switch (context->sessions.add(session, limit)) {
    case Admission::kServed:
      session->start();
      break;
    case Admission::kRefused:
      session->start_refusal();
      break;
    case Admission::kClosed:
      break;
  }
}

}  // namespace

Result<std::unique_ptr<HttpServer>> HttpServer::listen(asio::io_context& io,
                                                       CompletionService& service,
                                                       HttpOptions options) {
  auto context = std::make_shared<HttpSessionContext>(service, std::move(options));
  const HttpOptions& kept = context->handlers.options();
  auto listener = Listener::open(io, kept.host, kept.port, [context](asio::ip::tcp::socket socket) {
    start_session(context, std::move(socket));
  });
  if (!listener.ok()) return listener.status();
  (*listener)->start();
  return std::unique_ptr<HttpServer>(new HttpServer(*std::move(listener), std::move(context)));
}

HttpServer::HttpServer(std::shared_ptr<Listener> listener,
                       std::shared_ptr<HttpSessionContext> context)
    : listener_(std::move(listener)), context_(std::move(context)) {}

HttpServer::~HttpServer() { stop_now(); }

std::uint16_t HttpServer::port() const { return listener_->port(); }

std::size_t HttpServer::n_connections() const { return context_->sessions.size(); }

void HttpServer::stop_gently() {
  const auto sessions = context_->sessions.stop();
  listener_->close();
  for (const auto& session : sessions) session->stop_gently();
}

void HttpServer::stop_now() {
  const auto sessions = context_->sessions.stop();
  listener_->close();
  for (const auto& session : sessions) session->stop_now();
}

bool HttpServer::wait_stopped(Deadline deadline) { return context_->sessions.wait_empty(deadline); }

}  // namespace spindle::api
