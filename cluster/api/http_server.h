#pragma once
// The HTTP API's server: accepts connections and runs one HttpSession for each.

#include <boost/asio/io_context.hpp>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "cluster/api/completion_service.h"
#include "cluster/api/http_handlers.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

namespace spindle::api {

class Listener;
struct HttpSessionContext;

// Owns the listening socket. Sessions run on the given io_context, each on its own strand, and keep
// what they need alive, except the service, which must outlive the io_context's last handler. The
// io_context must outlive the server and be run by somebody.
//
// Limits are the service's (config::Limits): max_connections, max_body_bytes, read_timeout_ms for
// one request, idle_timeout_ms without one, max_buffered_bytes and write_timeout_ms for slow
// readers.
//
// Thread-safety: every member may be called from any thread.
class HttpServer {
 public:
  // Binds and starts to accept. UNAVAILABLE when the address is taken, INVALID_ARGUMENT when it is
  // not an address of this host.
  static Result<std::unique_ptr<HttpServer>> listen(boost::asio::io_context& io,
                                                    CompletionService& service,
                                                    HttpOptions options);
  // stop_now(), without waiting.
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  std::uint16_t port() const;
  std::size_t n_connections() const;

  // Stops to accept, closes idle connections, and the others after the response under way.
  void stop_gently();
  // Stops to accept, cancels what runs and closes every connection.
  void stop_now();
  // After a stop: true once every session has ended. Needs a running io_context, so not from its
  // threads.
  bool wait_stopped(Deadline deadline);

 private:
  HttpServer(std::shared_ptr<Listener> listener, std::shared_ptr<HttpSessionContext> context);

  std::shared_ptr<Listener> listener_;
  std::shared_ptr<HttpSessionContext> context_;
};

}  // namespace spindle::api
