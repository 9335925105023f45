#pragma once
// One HTTP connection.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "cluster/api/http_generation.h"
#include "cluster/api/http_handlers.h"
#include "cluster/api/http_message.h"
#include "cluster/api/session_set.h"
#include "cluster/api/socket_deadline.h"
#include "cluster/api/state_feed.h"
#include "proto/config.pb.h"

namespace spindle::api {

class HttpSession;
struct AdminAnswer;

// What all sessions of a server share. Thread-safety: the feed and the set see to themselves, the
// rest is constant.
struct HttpSessionContext {
  HttpSessionContext(CompletionService& service, HttpOptions options)
      : handlers(service, std::move(options)),
        limits(service.config().limits),
        state_feed([this] { return handlers.state_json(); },
                   std::chrono::milliseconds(handlers.options().state_interval_ms),
                   handlers.options().max_state_streams) {}

  const HttpHandlers handlers;
  const config::Limits limits;
  StateFeed state_feed;
  SessionSet<HttpSession> sessions;
};

// Reads requests one after the other and answers each before it reads the next (pipelined requests
// wait in a bounded buffer). While a request generates, the session goes on reading, so that it
// notices a client that has gone and cancels.
//
// The coroutine in start() keeps the session alive. Thread-safety: start and the two stops may be
// called from any thread; everything else happens on the socket's strand.
class HttpSession : public std::enable_shared_from_this<HttpSession> {
 public:
  HttpSession(boost::asio::ip::tcp::socket socket, std::shared_ptr<HttpSessionContext> context);
  ~HttpSession();
  HttpSession(const HttpSession&) = delete;
  HttpSession& operator=(const HttpSession&) = delete;

  void start();
  // Answers 503 to a connection over the limit and closes it.
  void start_refusal();
  // Closes as soon as no response is under way.
  void stop_gently();
  // Cancels what runs and closes.
  void stop_now();

 private:
  template <typename T>
  using Task = boost::asio::awaitable<T>;

  Task<void> run();
  Task<void> run_refusal();
  // False when the connection is to be closed without an answer.
  Task<bool> read_request(HttpRequest& request, std::optional<HttpResponse>& refusal);
  Task<bool> wait_for_request();
  Task<bool> answer(HttpRequest& request);
  Task<bool> generate(HttpRequest& request);
  Task<std::optional<HttpResponse>> parse_generation(HttpRequest& request, OpenAiRequest& out);
  // Gives an order to the whole cluster and waits for it (http_session_admin.cc).
  Task<bool> administer(HttpRequest& request);
  Task<bool> write_pieces(const HttpRequest& request, const AdminAnswer& answer);
  Task<bool> stream_output(const HttpRequest& request, HttpGeneration& generation);
  Task<bool> stream_state(const HttpRequest& request);
  Task<bool> write_response(const HttpRequest& request, const HttpResponse& response);
  Task<bool> write_chunk(const HttpRequest& request, std::string_view data);
  Task<bool> write_all(std::string_view data);
  Task<void> wait_for_change(std::chrono::steady_clock::time_point until);
  Task<void> close_gracefully();

  std::string response_head(const HttpRequest& request, const HttpResponse& response,
                            bool keep_alive) const;
  static constexpr std::string_view kEventStream = "text/event-stream; charset=utf-8";
  std::string stream_head(const HttpRequest& request, std::string_view content_type) const;
  void watch_client();
  Task<void> end_watch();
  void wake();
  bool gone() const { return client_gone_ || stop_now_; }
  void count(const HttpRequest& request, int status) const;
  void observe(const HttpRequest& request, std::size_t request_bytes,
               std::chrono::steady_clock::time_point began) const;

  boost::asio::ip::tcp::socket socket_;
  const std::shared_ptr<HttpSessionContext> context_;
  boost::beast::flat_buffer buffer_;
  SocketDeadline deadline_;
  boost::asio::steady_timer change_;  // never fires early unless something has changed
  boost::asio::cancellation_signal watch_cancel_;
  std::shared_ptr<HttpGeneration> generation_;
  bool streaming_state_ = false;
  std::uint64_t bytes_written_ = 0;  // of the answer under way
  bool watching_ = false;
  bool administering_ = false;
  bool client_gone_ = false;
  bool idle_ = false;
  bool stop_gently_ = false;
  bool stop_now_ = false;
};

}  // namespace spindle::api
