#include "cluster/api/tcp_client.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/write.hpp>
#include <cctype>
#include <iterator>
#include <optional>
#include <unordered_map>
#include <utility>

#include "cluster/api/tcp_errors.h"

namespace spindle::api {
namespace {

namespace asio = boost::asio;
using boost::system::error_code;

constexpr std::size_t kReadBytes = 64U << 10U;
// How long the server's confirmation of a cancel is awaited.
constexpr std::chrono::seconds kCancelWait{5};
constexpr std::chrono::seconds kPingInterval{10};
// Choices of one request; a server that names more is broken.
constexpr std::int32_t kMaxChoices = 1024;

// "Connection refused" -> "connection refused", to stand in the middle of a sentence.
std::string reason(const error_code& error) {
  std::string text = error.message();
  if (!text.empty()) {
    text[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(text[0])));
  }
  return text;
}

}  // namespace

CancelEvent::CancelEvent() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  CHECK(fd_ >= 0, "eventfd failed");
}

CancelEvent::~CancelEvent() { ::close(fd_); }

void CancelEvent::trigger() const noexcept {
  const std::uint64_t one = 1;
  // Fails only when the counter is full, and then the event is set already.
  [[maybe_unused]] const auto ignored = ::write(fd_, &one, sizeof one);
}

// The socket and everything that arrives on it. Reading and writing run concurrently inside
// run_until(), so a large request never deadlocks against a large answer.
class TcpClient::Connection {
 public:
  struct Request {
    GenerateOutcome outcome;
    DeltaCallback on_delta;
    bool finished = false;
  };

  explicit Connection(TcpClientOptions options)
      : options_(std::move(options)), socket_(io_), decoder_(options_.max_frame_bytes) {}

  std::string address() const { return options_.host + ":" + std::to_string(options_.port); }

  Status open(Deadline deadline) {
    Result<asio::ip::tcp::resolver::results_type> endpoints = resolve();
    if (!endpoints.ok()) {
      return endpoints.status();
    }
    std::optional<error_code> outcome;
    asio::async_connect(
        socket_, *endpoints,
        [&outcome](const error_code& error, const asio::ip::tcp::endpoint&) { outcome = error; });
    while (!outcome && !deadline.passed()) {
      io_.run_one_until(deadline.at());
    }
    if (!outcome) {
      error_code ignored;
      socket_.close(ignored);
      io_.run();  // the handler refers to this frame
      return deadline_exceeded("cannot reach " + address() + ": no answer in time");
    }
    if (*outcome) {
      return unavailable("cannot reach " + address() + ": " + reason(*outcome));
    }
    error_code ignored;
    socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
    start_read();
    return hello(deadline);
  }

  const v1::Welcome& welcome() const { return welcome_; }
  const Status& status() const { return status_; }
  std::unordered_map<std::uint64_t, Request>& requests() { return requests_; }
  std::uint64_t new_id() { return next_id_++; }
  std::uint64_t n_ended() const { return n_ended_; }
  std::uint64_t n_frames() const { return n_frames_; }

  Status send(const v1::Frame& frame) {
    if (!status_.ok()) {
      return status_;
    }
    if (Status status = append_frame(frame, options_.max_frame_bytes, pending_); !status.ok()) {
      return status;
    }
    if (writing_.empty()) {
      start_write();
    }
    return ok_status();
  }

  // Sends and receives until `done()`, the connection's end or the deadline.
  template <typename Condition>
  Status run_until(const Condition& done, Deadline deadline) {
    while (!done()) {
      if (!status_.ok()) {
        return status_;
      }
      if (deadline.passed()) {
        return deadline_exceeded("no answer from " + address() + " in time");
      }
      io_.restart();
      io_.run_one_until(deadline.at());
    }
    return ok_status();
  }

  // The replies to stats, drain and ping wait here for their caller.
  std::unordered_map<std::uint64_t, std::optional<v1::Frame>>& replies() { return replies_; }

  asio::io_context& io() { return io_; }

 private:
  Result<asio::ip::tcp::resolver::results_type> resolve() {
    using Results = asio::ip::tcp::resolver::results_type;
    error_code error;
    const asio::ip::address address_of_host = asio::ip::make_address(options_.host, error);
    if (!error) {
      return Results::create(asio::ip::tcp::endpoint(address_of_host, options_.port), "", "");
    }
    asio::ip::tcp::resolver resolver(io_);
    Results results = resolver.resolve(options_.host, std::to_string(options_.port), error);
    if (error) {
      return unavailable("cannot find the host " + options_.host + ": " + reason(error));
    }
    return results;
  }

  Status hello(Deadline deadline) {
    v1::Frame frame;
    v1::Hello& hello = *frame.mutable_hello();
    hello.mutable_version()->set_major(kProtocolMajor);
    hello.mutable_version()->set_minor(kProtocolMinor);
    hello.set_api_key(options_.api_key);
    hello.set_client_name(options_.client_name);
    if (Status status = send(frame); !status.ok()) {
      return status;
    }
    Status status = run_until([this] { return welcome_.has_version(); }, deadline);
    if (status.code() == StatusCode::kDeadlineExceeded && status_.ok()) {
      return deadline_exceeded(address() + " accepted the connection but did not answer in time");
    }
    return status;
  }

  void start_read() {
    socket_.async_read_some(asio::buffer(read_buffer_),
                            [this](const error_code& error, std::size_t n_bytes) {
                              if (error) {
                                lose(unavailable("the server closed the connection"));
                                return;
                              }
                              receive({read_buffer_.data(), n_bytes});
                              if (status_.ok()) {
                                start_read();
                              }
                            });
  }

  void start_write() {
    writing_.swap(pending_);
    asio::async_write(socket_, asio::buffer(writing_),
                      [this](const error_code& error, std::size_t) {
                        writing_.clear();
                        // A failed write is not the end: the reader may still find the server's
                        // goodbye.
                        if (!error && !pending_.empty()) {
                          start_write();
                        }
                      });
  }

  void receive(std::string_view bytes) {
    decoder_.feed(bytes);
    while (status_.ok()) {
      Result<std::optional<v1::Frame>> frame = decoder_.next();
      if (!frame.ok()) {
        lose(frame.status().with_context("the server's answer cannot be read"));
        return;
      }
      if (!frame->has_value()) {
        return;
      }
      ++n_frames_;
      handle(std::move(**frame));
    }
  }

  void handle(v1::Frame&& frame) {
    const std::uint64_t id = frame.id();
    if (frame.has_error() && id == 0) {
      lose(status_of(frame.error()));
      return;
    }
    if (frame.has_welcome()) {
      welcome_ = std::move(*frame.mutable_welcome());
      welcome_.mutable_version();
      return;
    }
    if (const auto reply = replies_.find(id); reply != replies_.end()) {
      reply->second = std::move(frame);
      return;
    }
    const auto it = requests_.find(id);
    if (it == requests_.end() || it->second.finished) {
      return;  // of a request that was given up
    }
    Request& request = it->second;
    GenerateOutcome& outcome = request.outcome;
    switch (frame.body_case()) {
      case v1::Frame::kAccepted:
        outcome.request_id = frame.accepted().request_id();
        outcome.prompt_tokens = frame.accepted().prompt_tokens();
        break;
      case v1::Frame::kScores:
        std::move(frame.mutable_scores()->mutable_scores()->begin(),
                  frame.mutable_scores()->mutable_scores()->end(),
                  std::back_inserter(outcome.prompt_scores));
        break;
      case v1::Frame::kDelta:
        take_delta(request, frame.delta());
        break;
      case v1::Frame::kDone:
        outcome.usage = std::move(*frame.mutable_done()->mutable_usage());
        end(request, ok_status());
        break;
      case v1::Frame::kError:
        outcome.param = frame.error().param();
        outcome.retry_after_ms = frame.error().retry_after_ms();
        end(request, status_of(frame.error()));
        break;
      default:
        break;  // a newer server's frames
    }
  }

  void take_delta(Request& request, const v1::Delta& delta) {
    if (delta.choice() < 0 || delta.choice() >= kMaxChoices) {
      lose(internal_error("the server sent a choice out of range"));
      return;
    }
    std::vector<ChoiceOutput>& choices = request.outcome.choices;
    const auto index = static_cast<std::size_t>(delta.choice());
    choices.resize(std::max(choices.size(), index + 1));
    ChoiceOutput& choice = choices[index];
    choice.text += delta.text();
    choice.token_ids.insert(choice.token_ids.end(), delta.token_ids().begin(),
                            delta.token_ids().end());
    choice.logprobs.insert(choice.logprobs.end(), delta.logprobs().begin(), delta.logprobs().end());
    if (delta.finish_reason() != v1::NOT_FINISHED) {
      choice.finish_reason = delta.finish_reason();
      choice.stop_reason = delta.stop_reason();
    }
    if (request.on_delta) {
      request.on_delta(delta);
    }
  }

  void end(Request& request, Status status) {
    request.outcome.status = std::move(status);
    request.finished = true;
    ++n_ended_;
  }

  void lose(Status status) {
    status_ = std::move(status);
    error_code ignored;
    socket_.close(ignored);
    for (auto& [id, request] : requests_) {
      if (!request.finished) {
        end(request, status_);
      }
    }
  }

  const TcpClientOptions options_;
  asio::io_context io_{1};
  asio::ip::tcp::socket socket_;
  FrameDecoder decoder_;
  std::array<char, kReadBytes> read_buffer_{};
  std::string pending_;  // encoded frames that wait for the write in progress
  std::string writing_;
  Status status_;
  v1::Welcome welcome_;
  std::unordered_map<std::uint64_t, Request> requests_;
  std::unordered_map<std::uint64_t, std::optional<v1::Frame>> replies_;
  std::uint64_t next_id_ = 1;
  std::uint64_t n_ended_ = 0;
  std::uint64_t n_frames_ = 0;
};

TcpClient::TcpClient(std::unique_ptr<Connection> connection) : connection_(std::move(connection)) {}
TcpClient::~TcpClient() = default;

Result<std::unique_ptr<TcpClient>> TcpClient::connect(TcpClientOptions options, Deadline deadline) {
  auto connection = std::make_unique<Connection>(std::move(options));
  if (Status status = connection->open(deadline); !status.ok()) {
    return status;
  }
  return std::unique_ptr<TcpClient>(new TcpClient(std::move(connection)));
}

const v1::Welcome& TcpClient::welcome() const { return connection_->welcome(); }
Status TcpClient::connection_status() const { return connection_->status(); }

Result<std::uint64_t> TcpClient::submit(v1::GenerateRequest request, DeltaCallback on_delta) {
  v1::Frame frame;
  frame.set_id(connection_->new_id());
  *frame.mutable_generate() = std::move(request);
  if (Status status = connection_->send(frame); !status.ok()) {
    return status;
  }
  connection_->requests()[frame.id()].on_delta = std::move(on_delta);
  return frame.id();
}

void TcpClient::cancel(std::uint64_t id) {
  if (connection_->requests().contains(id) && !finished(id)) {
    v1::Frame frame;
    frame.set_id(id);
    frame.mutable_cancel();
    // A lost connection has already ended the request.
    [[maybe_unused]] const Status sent = connection_->send(frame);
  }
}

Status TcpClient::run(Deadline deadline) {
  const std::uint64_t before = connection_->n_ended();
  return connection_->run_until([&] { return connection_->n_ended() != before; }, deadline);
}

bool TcpClient::finished(std::uint64_t id) const {
  const auto it = connection_->requests().find(id);
  return it != connection_->requests().end() && it->second.finished;
}

std::size_t TcpClient::n_open() const {
  const auto& requests = connection_->requests();
  return static_cast<std::size_t>(std::count_if(
      requests.begin(), requests.end(), [](const auto& entry) { return !entry.second.finished; }));
}

GenerateOutcome TcpClient::take(std::uint64_t id) {
  if (!finished(id)) {
    GenerateOutcome none;
    none.status = not_found("no finished request has the id " + std::to_string(id));
    return none;
  }
  return std::move(connection_->requests().extract(id).mapped().outcome);
}

GenerateOutcome TcpClient::generate(v1::GenerateRequest request, const DeltaCallback& on_delta,
                                    const GenerateOptions& options) {
  GenerateOutcome outcome;
  // Outlives the descriptor's handler whatever happens below.
  const auto cancel_seen = std::make_shared<bool>(false);
  asio::posix::stream_descriptor cancel_source(connection_->io());
  if (options.cancel_fd >= 0) {
    error_code error;
    cancel_source.assign(::dup(options.cancel_fd), error);
    if (error) {
      outcome.status = internal_error("cannot watch for a cancel: " + error.message());
      return outcome;
    }
    cancel_source.async_wait(asio::posix::descriptor_base::wait_read,
                             [cancel_seen](const error_code& failure) { *cancel_seen = !failure; });
  }
  const Result<std::uint64_t> id = submit(std::move(request), on_delta);
  if (!id.ok()) {
    outcome.status = id.status();
    return outcome;
  }
  Status given_up;
  while (!finished(*id) && given_up.ok()) {
    const std::uint64_t seen = connection_->n_frames();
    const Status waited = connection_->run_until(
        [&] { return finished(*id) || *cancel_seen || connection_->n_frames() != seen; },
        Deadline::after(options.progress_timeout));
    if (*cancel_seen) {
      given_up = cancelled("cancelled");
    } else if (!waited.ok() && !finished(*id)) {
      given_up = waited;
    }
  }
  if (!finished(*id)) {
    cancel(*id);
    [[maybe_unused]] const Status confirmed =
        connection_->run_until([&] { return finished(*id); }, Deadline::after(kCancelWait));
  }
  const bool ended = finished(*id);
  outcome = std::move(connection_->requests().extract(*id).mapped().outcome);
  // The end may have crossed our cancel; then the request simply succeeded.
  if (!ended || (!given_up.ok() && !outcome.status.ok())) {
    outcome.status = given_up;
  }
  return outcome;
}

Result<v1::Frame> TcpClient::call(v1::Frame request, v1::Frame::BodyCase reply, Deadline deadline) {
  const std::uint64_t id = connection_->new_id();
  request.set_id(id);
  if (Status status = connection_->send(request); !status.ok()) {
    return status;
  }
  auto& replies = connection_->replies();
  replies[id] = std::nullopt;
  Status status = connection_->run_until([&] { return replies[id].has_value(); }, deadline);
  std::optional<v1::Frame> frame = std::move(replies.extract(id).mapped());
  if (!frame) {
    return status;
  }
  if (frame->has_error()) {
    return status_of(frame->error());
  }
  if (frame->body_case() != reply) {
    return internal_error("the server answered with another kind of frame");
  }
  return std::move(*frame);
}

Result<v1::Stats> TcpClient::stats(Deadline deadline) {
  v1::Frame request;
  request.mutable_stats_request();
  Result<v1::Frame> reply = call(std::move(request), v1::Frame::kStats, deadline);
  if (!reply.ok()) {
    return reply.status();
  }
  return std::move(*reply->mutable_stats());
}

Result<v1::DrainReply> TcpClient::drain(Deadline deadline) {
  v1::Frame request;
  request.mutable_drain_request();
  Result<v1::Frame> reply = call(std::move(request), v1::Frame::kDrainReply, deadline);
  if (!reply.ok()) {
    return reply.status();
  }
  return std::move(*reply->mutable_drain_reply());
}

Status TcpClient::ping(Deadline deadline) {
  v1::Frame request;
  request.mutable_ping();
  return call(std::move(request), v1::Frame::kPong, deadline).status();
}

Status TcpClient::wait_closed(Deadline deadline) {
  while (connection_->status().ok()) {
    if (deadline.passed()) {
      return deadline_exceeded("the server has not closed the connection in time");
    }
    const Deadline next_ping(std::min(deadline.at(), Deadline::after(kPingInterval).at()));
    [[maybe_unused]] const Status waited = connection_->run_until([] { return false; }, next_ping);
    if (connection_->status().ok() && !deadline.passed()) {
      [[maybe_unused]] const Status answered = ping(deadline);
    }
  }
  return ok_status();
}

}  // namespace spindle::api
