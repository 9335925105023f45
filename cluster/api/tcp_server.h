#pragma once
// The TCP API's server: accepts connections and runs one TcpSession for each.

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/io_context.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/engine/engine.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::api {

class Listener;
struct TcpSessionContext;

struct TcpServerOptions {
  std::string host = "127.0.0.1";  // an address or a name; never "all interfaces" by default
  std::uint16_t port = 8001;       // 0: any free port, see TcpServer::port()
  std::vector<std::string> api_keys;
  config::Limits limits;
  // What Welcome tells clients.
  std::string server_version;
  std::string model;
  std::int32_t max_model_len = 0;
  std::int32_t n_stages = 1;
  std::int32_t vocab_size = 0;
};

// What the server does with requests. Called on the I/O threads, so each returns at once; all may
// be called concurrently, and until the io_context has stopped.
struct TcpServerHooks {
  // CompletionService::start. The sink is called on the executor, never from inside start.
  std::function<std::shared_ptr<Completion>(GenerateRequest, boost::asio::any_io_executor,
                                            std::shared_ptr<OutputSink>)>
      start;
  std::function<engine::EngineStats()> stats;
  // Begins to drain and returns the number of requests that still run.
  std::function<std::int32_t()> drain;
};

// Owns the listening socket. Sessions run on the given io_context, each on its own strand, and keep
// what they need alive; the io_context must outlive the server and be run by somebody.
//
// Limits (config::Limits): max_connections, max_requests_per_connection, max_frame_bytes,
// read_timeout_ms for one frame, idle_timeout_ms without a request, max_buffered_bytes and
// write_timeout_ms for slow readers.
//
// Thread-safety: every member may be called from any thread.
class TcpServer {
 public:
  // Binds and starts to accept. UNAVAILABLE when the address is taken, INVALID_ARGUMENT when it is
  // not an address of this host.
  static Result<std::unique_ptr<TcpServer>> listen(boost::asio::io_context& io,
                                                   TcpServerOptions options, TcpServerHooks hooks);
  // stop(), without waiting.
  ~TcpServer();
  TcpServer(const TcpServer&) = delete;
  TcpServer& operator=(const TcpServer&) = delete;

  std::uint16_t port() const;
  std::size_t n_connections() const;

  // Stops to accept, cancels what still runs, says goodbye (Error UNAVAILABLE, id 0) on every
  // connection and closes it. To let requests finish, drain the service first.
  void stop();
  // After stop(): true once every session has ended, which takes at most
  // limits.write_timeout_ms and a second. Needs a running io_context, so not from its threads.
  bool wait_stopped(Deadline deadline);

 private:
  TcpServer(std::shared_ptr<Listener> listener, std::shared_ptr<TcpSessionContext> context);

  std::shared_ptr<Listener> listener_;
  std::shared_ptr<TcpSessionContext> context_;
};

}  // namespace spindle::api
