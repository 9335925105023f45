#pragma once
// One connection of the TCP API.

#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>

#include "cluster/api/api_keys.h"
#include "cluster/api/framing.h"
#include "cluster/api/session_set.h"
#include "cluster/api/tcp_messages.h"
#include "cluster/api/tcp_server.h"

namespace spindle::api {

class TcpSession;

// What a server's sessions share.
// Thread-safety: the set sees to itself; the rest is constant.
struct TcpSessionContext {
  TcpSessionContext(TcpServerOptions server_options, TcpServerHooks server_hooks)
      : options(std::move(server_options)),
        hooks(std::move(server_hooks)),
        api_keys(options.api_keys) {}

  const TcpServerOptions options;
  const TcpServerHooks hooks;
  const ApiKeys api_keys;
  const std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
  SessionSet<TcpSession> sessions;
};

// Three coroutines on one strand: a reader (socket -> decoder -> handlers), a writer (output
// buffer -> socket) and a watchdog that holds all deadlines. They keep the session alive; it leaves
// the context's list and is destroyed when the last of them returns. A request's sink holds the
// session weakly.
//
// Output is bounded: a delta that does not fit into limits.max_buffered_bytes cancels its request,
// and the reader takes no further frame while the buffer is over the limit. What is left is one
// closing frame per open request. Scores of prompts can be much larger than that limit; they wait
// beside the buffer, bounded by themselves, and the writer adds one frame of them to what it sends.
// Whatever their request says next waits behind them.
//
// Ends of a connection: the peer closed it or nothing could be written for write_timeout_ms (all
// requests are cancelled, nothing is sent), or goodbye() (an Error with id 0 is sent, then the
// sending side is shut, then input is discarded for a moment so that the peer can read the error).
//
// Thread-safety: start() and stop() from any thread; everything else runs on the strand.
class TcpSession : public std::enable_shared_from_this<TcpSession> {
 public:
  // The socket's executor is the session's strand.
  TcpSession(boost::asio::ip::tcp::socket socket, std::shared_ptr<TcpSessionContext> context);

  ~TcpSession();
  TcpSession(const TcpSession&) = delete;
  TcpSession& operator=(const TcpSession&) = delete;

  // With an error the connection is only told so and closed.
  void start(std::optional<ApiError> refusal = std::nullopt);
  void stop();

 private:
  friend class TcpRequestSink;
  using Clock = std::chrono::steady_clock;

  struct OpenRequest {
    std::shared_ptr<Completion> completion;
    // Sent in place of "cancelled" when the server was the one to cancel.
    std::optional<ApiError> verdict;
    bool cancelled = false;
    std::deque<engine::PromptScore> scores;  // that wait for the writer
    std::string behind_scores;               // encoded frames that follow them
    bool ended = false;                      // the last frame is in behind_scores
  };

  void begin(const std::optional<ApiError>& refusal);
  boost::asio::awaitable<void> read_loop();
  boost::asio::awaitable<void> write_loop();
  boost::asio::awaitable<void> watch_loop();
  boost::asio::awaitable<void> wait_for_room();
  // Spawns one of the loops on the strand; an exception in it (out of memory) closes the
  // connection.
  void spawn(boost::asio::awaitable<void> (TcpSession::*loop)());

  // Handlers of frames.
  void handle(v1::Frame&& frame);
  void handle_hello(const v1::Frame& frame);
  void handle_generate(std::uint64_t id, v1::GenerateRequest&& message);
  void handle_stats(std::uint64_t id);
  void cancel_request(std::uint64_t id, std::optional<ApiError> verdict);

  // What a request's sink reports.
  void on_accepted(std::uint64_t id, const std::string& request_id, std::int32_t prompt_tokens);
  void on_scores(std::uint64_t id, std::vector<engine::PromptScore>&& scores);
  void on_delta(std::uint64_t id, OutputDelta&& delta);
  void on_done(std::uint64_t id, const engine::RequestSummary& summary);
  void on_error(std::uint64_t id, const ApiError& error);

  void send(const v1::Frame& frame);
  // Output of a request: waits behind its scores.
  void send_output(const v1::Frame& frame);
  void append(const v1::Frame& frame, std::string& out);
  // In place of an answer that does not fit into a frame.
  void send_too_large(std::uint64_t id);
  // Appends the next frame of scores to writing_, if any wait.
  void write_scores();
  void forget(std::uint64_t id);
  void send_error(std::uint64_t id, const ApiError& error);
  void goodbye(const ApiError& error);
  void close();
  void cancel_all();

  // What counts towards max_buffered_bytes: everything but scores.
  std::size_t buffered_bytes() const;
  void update_read_deadlines(bool frame_was_taken);
  void set_deadline(Clock::time_point& deadline, Clock::time_point at);

  boost::asio::ip::tcp::socket socket_;
  const std::shared_ptr<TcpSessionContext> context_;
  const std::size_t max_frame_bytes_;
  const std::size_t max_buffered_bytes_;
  const std::size_t max_requests_;

  FrameDecoder decoder_;
  std::unordered_map<std::uint64_t, OpenRequest> requests_;
  std::string pending_;                    // encoded frames not yet given to the writer
  std::string writing_;                    // what the writer sends now
  std::size_t written_ = 0;                // bytes of writing_ that were sent
  std::size_t writing_scores_ = 0;         // bytes at the end of writing_ that are scores
  std::deque<std::uint64_t> score_order_;  // requests whose scores wait, the next one first
  bool authenticated_ = false;
  std::uint64_t owner_ = 0;  // ApiKeys::owner_of the client's key
  bool closing_ = false;     // goodbye was said: nothing is accepted or queued any more
  bool closed_ = false;      // the socket is closed
  bool reader_ended_ = false;
  bool writer_ended_ = false;
  std::uint64_t n_requests_ = 0;  // ever, for the ids of requests that bring none
  const std::uint64_t session_number_;

  // time_point::max(): no deadline.
  Clock::time_point frame_deadline_ = Clock::time_point::max();
  Clock::time_point idle_deadline_ = Clock::time_point::max();
  Clock::time_point write_deadline_ = Clock::time_point::max();
  Clock::time_point linger_deadline_ = Clock::time_point::max();

  boost::asio::steady_timer output_ready_;  // cancelled to wake the writer
  boost::asio::steady_timer room_ready_;    // cancelled to wake the reader
  boost::asio::steady_timer watchdog_;      // cancelled to make it look at the deadlines again
};

}  // namespace spindle::api
