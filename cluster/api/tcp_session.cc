#include "cluster/api/tcp_session.h"

#include <algorithm>
#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <exception>
#include <random>
#include <utility>

#include "cluster/api/tcp_errors.h"

namespace spindle::api {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

constexpr std::size_t kReadBytes = 16U << 10U;
// Before the key was checked nobody can make the server hold more than this.
constexpr std::size_t kMaxHelloBytes = 16U << 10U;
constexpr std::size_t kMaxRequestIdBytes = 128;
// How long input is discarded after goodbye, so that the peer reads the error before a reset.
constexpr std::chrono::seconds kLinger{1};
constexpr std::int64_t kSlowReaderRetryMs = 1000;
// For limits of zero or less: a timeout must still let an honest peer through.
constexpr std::int32_t kMinTimeoutMs = 10;

std::chrono::milliseconds timeout(std::int32_t limit_ms) {
  return std::chrono::milliseconds(std::max(limit_ms, kMinTimeoutMs));
}

bool usable_request_id(const std::string& id) {
  return id.size() <= kMaxRequestIdBytes &&
         std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < '\x7f'; });
}

std::string version_text(std::uint32_t major, std::uint32_t minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace

// Owned by the completion service; outlives its session when the connection was lost.
class TcpRequestSink : public OutputSink {
 public:
  TcpRequestSink(std::weak_ptr<TcpSession> session, std::uint64_t id, std::string request_id)
      : session_(std::move(session)), id_(id), request_id_(std::move(request_id)) {}

  void on_accepted(std::int32_t prompt_tokens) override {
    if (const auto session = session_.lock()) {
      session->on_accepted(id_, request_id_, prompt_tokens);
    }
  }
  void on_scores(std::vector<engine::PromptScore> scores) override {
    if (const auto session = session_.lock()) {
      session->on_scores(id_, std::move(scores));
    }
  }
  void on_delta(OutputDelta delta) override {
    if (const auto session = session_.lock()) {
      session->on_delta(id_, std::move(delta));
    }
  }
  void on_done(const engine::RequestSummary& summary) override {
    if (const auto session = session_.lock()) {
      session->on_done(id_, summary);
    }
  }
  void on_error(const ApiError& error) override {
    if (const auto session = session_.lock()) {
      session->on_error(id_, error);
    }
  }

 private:
  const std::weak_ptr<TcpSession> session_;
  const std::uint64_t id_;
  const std::string request_id_;
};

TcpSession::TcpSession(asio::ip::tcp::socket socket, std::shared_ptr<TcpSessionContext> context)
    : socket_(std::move(socket)),
      context_(std::move(context)),
      max_frame_bytes_(static_cast<std::size_t>(
          std::max<std::int64_t>(context_->options.limits.max_frame_bytes(), 1))),
      max_buffered_bytes_(static_cast<std::size_t>(
          std::max<std::int64_t>(context_->options.limits.max_buffered_bytes(), 1))),
      max_requests_(static_cast<std::size_t>(
          std::max(context_->options.limits.max_requests_per_connection(), 1))),
      decoder_(std::min(kMaxHelloBytes, max_frame_bytes_)),
      session_number_((static_cast<std::uint64_t>(std::random_device()()) << 32U) |
                      std::random_device()()),
      output_ready_(socket_.get_executor(), Clock::time_point::max()),
      room_ready_(socket_.get_executor(), Clock::time_point::max()),
      watchdog_(socket_.get_executor(), Clock::time_point::max()) {}

TcpSession::~TcpSession() { context_->sessions.remove(this); }

void TcpSession::start(std::optional<ApiError> refusal) {
  asio::post(socket_.get_executor(),
             [self = shared_from_this(), refusal = std::move(refusal)] { self->begin(refusal); });
}

void TcpSession::begin(const std::optional<ApiError>& refusal) {
  error_code ignored;
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(asio::socket_base::keep_alive(true), ignored);
  // One deadline for everything up to the complete Hello.
  frame_deadline_ = Clock::now() + timeout(context_->options.limits.read_timeout_ms());
  if (refusal) {
    goodbye(*refusal);
  }
  spawn(&TcpSession::read_loop);
  spawn(&TcpSession::write_loop);
  spawn(&TcpSession::watch_loop);
}

void TcpSession::spawn(asio::awaitable<void> (TcpSession::*loop)()) {
  asio::co_spawn(
      socket_.get_executor(), [self = shared_from_this(), loop] { return ((*self).*loop)(); },
      [self = shared_from_this()](const std::exception_ptr& error) {
        if (error) {
          self->close();
        }
      });
}

void TcpSession::stop() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->goodbye({unavailable("the server stops"), "", kSlowReaderRetryMs});
  });
}

// ---- loops

asio::awaitable<void> TcpSession::read_loop() {
  std::array<char, kReadBytes> bytes;
  while (!closed_) {
    error_code error;
    const std::size_t n = co_await socket_.async_read_some(
        asio::buffer(bytes), asio::redirect_error(asio::use_awaitable, error));
    if (error) {
      break;
    }
    if (closing_) {
      continue;
    }
    decoder_.feed({bytes.data(), n});
    bool frame_was_taken = false;
    while (!closing_) {
      Result<std::optional<v1::Frame>> frame = decoder_.next();
      if (!frame.ok()) {
        goodbye({frame.status()});
        break;
      }
      if (!frame->has_value()) {
        break;
      }
      frame_was_taken = true;
      handle(std::move(**frame));
      co_await wait_for_room();
    }
    update_read_deadlines(frame_was_taken);
  }
  reader_ended_ = true;
  // A peer that closed while a goodbye is on its way may still read it.
  if (!closing_ || writer_ended_) {
    close();
  }
}

asio::awaitable<void> TcpSession::wait_for_room() {
  while (!closed_ && !closing_ && buffered_bytes() > max_buffered_bytes_) {
    frame_deadline_ = Clock::time_point::max();  // it is not the peer's frame that is waited for
    error_code cancelled;
    co_await room_ready_.async_wait(asio::redirect_error(asio::use_awaitable, cancelled));
  }
}

asio::awaitable<void> TcpSession::write_loop() {
  while (!closed_) {
    error_code error;
    if (pending_.empty() && score_order_.empty()) {
      if (closing_) {
        break;
      }
      co_await output_ready_.async_wait(asio::redirect_error(asio::use_awaitable, error));
      continue;
    }
    writing_.swap(pending_);
    write_scores();
    while (!closed_ && written_ < writing_.size()) {
      set_deadline(write_deadline_,
                   Clock::now() + timeout(context_->options.limits.write_timeout_ms()));
      written_ += co_await socket_.async_write_some(
          asio::buffer(writing_.data() + written_, writing_.size() - written_),
          asio::redirect_error(asio::use_awaitable, error));
      if (error) {
        close();
      }
    }
    write_deadline_ = Clock::time_point::max();
    writing_.clear();
    written_ = 0;
    writing_scores_ = 0;
    room_ready_.cancel();
  }
  writer_ended_ = true;
  if (closed_ || reader_ended_) {
    close();
    co_return;
  }
  error_code ignored;
  socket_.shutdown(asio::socket_base::shutdown_send, ignored);
  set_deadline(linger_deadline_, std::min(linger_deadline_, Clock::now() + kLinger));
}

asio::awaitable<void> TcpSession::watch_loop() {
  while (!closed_) {
    const Clock::time_point now = Clock::now();
    if (now >= write_deadline_ || now >= linger_deadline_) {
      close();
      break;
    }
    if (!closing_ && now >= frame_deadline_) {
      goodbye({deadline_exceeded(
          std::string(authenticated_ ? "a frame" : "the Hello frame") + " was not complete after " +
          std::to_string(context_->options.limits.read_timeout_ms()) + " ms")});
    } else if (!closing_ && now >= idle_deadline_) {
      goodbye({deadline_exceeded("the connection had no request and no frame for " +
                                 std::to_string(context_->options.limits.idle_timeout_ms()) +
                                 " ms; send a Ping to keep it")});
    }
    watchdog_.expires_at(
        std::min({frame_deadline_, idle_deadline_, write_deadline_, linger_deadline_}));
    error_code cancelled;
    co_await watchdog_.async_wait(asio::redirect_error(asio::use_awaitable, cancelled));
  }
}

void TcpSession::set_deadline(Clock::time_point& deadline, Clock::time_point at) {
  deadline = at;
  // A later deadline is seen when the earlier one wakes the watchdog.
  if (at < watchdog_.expiry()) {
    watchdog_.cancel();
  }
}

void TcpSession::update_read_deadlines(bool frame_was_taken) {
  if (closing_) {
    return;
  }
  const config::Limits& limits = context_->options.limits;
  if (authenticated_) {
    if (frame_was_taken) {
      frame_deadline_ = Clock::time_point::max();
    }
    if (decoder_.holds_bytes() && frame_deadline_ == Clock::time_point::max()) {
      set_deadline(frame_deadline_, Clock::now() + timeout(limits.read_timeout_ms()));
    }
    if (requests_.empty()) {
      set_deadline(idle_deadline_, Clock::now() + timeout(limits.idle_timeout_ms()));
    }
  }
}

// ---- frames from the client

void TcpSession::handle(v1::Frame&& frame) {
  const std::uint64_t id = frame.id();
  if (!authenticated_) {
    handle_hello(frame);
    return;
  }
  v1::Frame reply;
  reply.set_id(id);
  switch (frame.body_case()) {
    case v1::Frame::kGenerate:
      handle_generate(id, std::move(*frame.mutable_generate()));
      break;
    case v1::Frame::kCancel:
      cancel_request(id, std::nullopt);
      break;
    case v1::Frame::kStatsRequest:
      handle_stats(id);
      break;
    case v1::Frame::kDrainRequest:
      reply.mutable_drain_reply()->set_running_requests(context_->hooks.drain());
      send(reply);
      break;
    case v1::Frame::kPing:
      reply.mutable_pong();
      send(reply);
      break;
    case v1::Frame::kHello:
      goodbye({invalid_argument("Hello was sent twice"), "hello"});
      break;
    default: {
      const ApiError error{unimplemented("the server does not know this kind of frame"), "body"};
      if (id == 0) {
        goodbye(error);
      } else {
        send_error(id, error);
      }
    }
  }
}

void TcpSession::handle_hello(const v1::Frame& frame) {
  if (frame.body_case() != v1::Frame::kHello) {
    goodbye({invalid_argument("the first frame of a connection must be Hello"), "hello"});
    return;
  }
  const v1::Version& version = frame.hello().version();
  if (version.major() != kProtocolMajor || version.minor() > kProtocolMinor) {
    goodbye({unimplemented("protocol version " + version_text(version.major(), version.minor()) +
                           " is not supported; this server speaks " +
                           version_text(kProtocolMajor, kProtocolMinor)),
             "hello.version"});
    return;
  }
  if (!context_->api_keys.accepts(frame.hello().api_key())) {
    goodbye(
        {{StatusCode::kUnauthenticated,
          frame.hello().api_key().empty() ? "an API key is needed" : "the API key is not known"},
         "hello.api_key"});
    return;
  }
  authenticated_ = true;
  owner_ = context_->api_keys.owner_of(frame.hello().api_key());
  decoder_.set_max_frame_bytes(max_frame_bytes_);
  const TcpServerOptions& options = context_->options;
  v1::Frame reply;
  v1::Welcome& welcome = *reply.mutable_welcome();
  welcome.mutable_version()->set_major(kProtocolMajor);
  welcome.mutable_version()->set_minor(kProtocolMinor);
  welcome.set_server_version(options.server_version);
  welcome.set_model(options.model);
  welcome.set_max_model_len(options.max_model_len);
  welcome.set_n_stages(options.n_stages);
  welcome.set_vocab_size(options.vocab_size);
  send(reply);
}

void TcpSession::handle_generate(std::uint64_t id, v1::GenerateRequest&& message) {
  if (id == 0) {
    goodbye({invalid_argument("a request's id must not be 0"), "id"});
    return;
  }
  if (requests_.contains(id)) {
    send_error(id, {invalid_argument("id " + std::to_string(id) +
                                     " belongs to a request that still runs, which goes on"),
                    "id"});
    return;
  }
  if (requests_.size() >= max_requests_) {
    send_error(id, {resource_exhausted("the connection has " + std::to_string(max_requests_) +
                                       " open requests, the most it may have"),
                    "", kSlowReaderRetryMs});
    return;
  }
  ParsedRequest parsed = to_generate_request(std::move(message));
  if (parsed.error.status.ok() && !usable_request_id(parsed.request.request_id)) {
    parsed.error = {
        invalid_argument("request_id must be at most " + std::to_string(kMaxRequestIdBytes) +
                         " printable ASCII characters without spaces"),
        "request_id"};
  }
  if (!parsed.error.status.ok()) {
    send_error(id, parsed.error);
    return;
  }
  if (parsed.request.request_id.empty()) {
    parsed.request.request_id =
        "tcp-" + std::to_string(session_number_) + "-" + std::to_string(++n_requests_);
  }
  parsed.request.owner = owner_;
  requests_.emplace(id, OpenRequest());
  idle_deadline_ = Clock::time_point::max();
  auto sink = std::make_shared<TcpRequestSink>(weak_from_this(), id, parsed.request.request_id);
  std::shared_ptr<Completion> completion =
      context_->hooks.start(std::move(parsed.request), socket_.get_executor(), std::move(sink));
  if (const auto it = requests_.find(id); it != requests_.end()) {
    it->second.completion = std::move(completion);
  }
}

void TcpSession::handle_stats(std::uint64_t id) {
  v1::Frame reply;
  reply.set_id(id);
  v1::Stats& stats = *reply.mutable_stats();
  stats = to_message(context_->hooks.stats());
  stats.set_model(context_->options.model);
  stats.set_server_version(context_->options.server_version);
  stats.set_uptime_seconds(std::chrono::duration<double>(Clock::now() - context_->started).count());
  send(reply);
}

void TcpSession::cancel_request(std::uint64_t id, std::optional<ApiError> verdict) {
  const auto it = requests_.find(id);
  // An unknown id is a request that ended while the Cancel was on its way.
  if (it == requests_.end() || it->second.cancelled) {
    return;
  }
  it->second.cancelled = true;
  it->second.verdict = std::move(verdict);
  if (it->second.completion) {
    it->second.completion->cancel();
  }
}

// ---- output of requests

void TcpSession::on_accepted(std::uint64_t id, const std::string& request_id,
                             std::int32_t prompt_tokens) {
  if (!requests_.contains(id)) {
    return;
  }
  v1::Frame frame;
  frame.set_id(id);
  frame.mutable_accepted()->set_request_id(request_id);
  frame.mutable_accepted()->set_prompt_tokens(prompt_tokens);
  send_output(frame);
}

void TcpSession::on_delta(std::uint64_t id, OutputDelta&& delta) {
  const auto it = requests_.find(id);
  if (it == requests_.end() || it->second.cancelled) {
    return;
  }
  v1::Frame frame;
  frame.set_id(id);
  *frame.mutable_delta() = to_message(std::move(delta));
  const std::size_t n_bytes = frame.ByteSizeLong() + kFrameHeaderBytes;
  if (buffered_bytes() > 0 && buffered_bytes() + n_bytes > max_buffered_bytes_) {
    cancel_request(
        id, ApiError{resource_exhausted("the output was not read fast enough: " +
                                        std::to_string(buffered_bytes()) + " bytes were waiting"),
                     "", kSlowReaderRetryMs});
    return;
  }
  send_output(frame);
}

void TcpSession::on_done(std::uint64_t id, const engine::RequestSummary& summary) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) {
    return;
  }
  v1::Frame frame;
  frame.set_id(id);
  *frame.mutable_done()->mutable_usage() = to_message(summary);
  if (it->second.scores.empty()) {
    requests_.erase(it);
  } else {
    it->second.ended = true;
  }
  send_output(frame);
  update_read_deadlines(false);
}

void TcpSession::on_error(std::uint64_t id, const ApiError& error) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) {
    return;
  }
  const std::optional<ApiError> verdict = std::move(it->second.verdict);
  forget(id);
  send_error(id, verdict ? *verdict : error);
  update_read_deadlines(false);
}

// ---- sending and ending

void TcpSession::send(const v1::Frame& frame) { append(frame, pending_); }

void TcpSession::send_output(const v1::Frame& frame) {
  const auto it = requests_.find(frame.id());
  const bool waits = it != requests_.end() && !it->second.scores.empty();
  append(frame, waits ? it->second.behind_scores : pending_);
}

void TcpSession::append(const v1::Frame& frame, std::string& out) {
  if (closing_ || closed_) {
    return;
  }
  if (!append_frame(frame, max_frame_bytes_, out).ok()) {
    send_too_large(frame.id());
  }
  output_ready_.cancel();
}

void TcpSession::send_too_large(std::uint64_t id) {
  v1::Frame notice;
  notice.set_id(id);
  *notice.mutable_error() = to_message(ApiError{internal_error("the answer is too large")});
  cancel_request(id, std::nullopt);
  forget(id);
  if (!append_frame(notice, max_frame_bytes_, pending_).ok()) {
    close();
  }
}

void TcpSession::send_error(std::uint64_t id, const ApiError& error) {
  v1::Frame frame;
  frame.set_id(id);
  *frame.mutable_error() = to_message(error);
  send(frame);
}

void TcpSession::goodbye(const ApiError& error) {
  if (closing_ || closed_) {
    return;
  }
  send_error(0, error);
  closing_ = true;
  frame_deadline_ = Clock::time_point::max();
  idle_deadline_ = Clock::time_point::max();
  set_deadline(linger_deadline_,
               Clock::now() + timeout(context_->options.limits.write_timeout_ms()) + kLinger);
  cancel_all();
  output_ready_.cancel();
  room_ready_.cancel();
}

void TcpSession::cancel_all() {
  // cancel() may call back at once when an executor runs inline; the map must not change under us.
  std::unordered_map<std::uint64_t, OpenRequest> requests;
  requests.swap(requests_);
  score_order_.clear();
  for (const auto& [id, request] : requests) {
    if (request.completion && !request.cancelled) {
      request.completion->cancel();
    }
  }
}

void TcpSession::close() {
  if (closed_) {
    return;
  }
  closed_ = true;
  closing_ = true;
  error_code ignored;
  socket_.close(ignored);
  cancel_all();
  output_ready_.cancel();
  room_ready_.cancel();
  watchdog_.cancel();
}

}  // namespace spindle::api
