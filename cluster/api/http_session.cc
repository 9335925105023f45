#include "cluster/api/http_session.h"

#include <fmt/format.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <utility>

#include "cluster/api/http_admin.h"
#include "cluster/api/json_fields.h"

namespace spindle::api {
namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

namespace {

constexpr auto kAwaitTuple = asio::as_tuple(asio::use_awaitable);
using Clock = std::chrono::steady_clock;
using Parser = http::request_parser<http::string_body>;

constexpr std::uint32_t kMaxHeaderBytes = 16 * 1024;
// Read ahead at most: the header, one piece of a body, and pipelined requests.
constexpr std::size_t kMaxBufferBytes = 128 * 1024;
constexpr std::size_t kMaxPipelinedBytes = 64 * 1024;
// The body of a request that is refused by its head is read up to this, to keep the connection.
constexpr std::uint64_t kMaxDiscardBytes = 64 * 1024;
// Larger bodies are parsed on the tokenizer's threads.
constexpr std::size_t kMaxInlineParseBytes = 64 * 1024;
constexpr std::int64_t kLingerMs = 1000;
constexpr std::size_t kMaxLingerBytes = 8 * 1024 * 1024;
// A slow reader's backlog shall wait in our bounded buffer, not in the kernel's.
constexpr int kMinSendBufferBytes = 16 * 1024;

std::string_view view(boost::beast::string_view text) { return {text.data(), text.size()}; }

// RFC 9110 Date.
std::string http_date() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 64> text{};
  const std::size_t n =
      std::strftime(text.data(), text.size(), "%a, %d %b %Y %H:%M:%S GMT", &parts);
  return {text.data(), n};
}

std::string status_line(int status, bool http_1_0) {
  const auto reason = http::obsolete_reason(static_cast<http::status>(status));
  return fmt::format("HTTP/1.{} {} {}\r\nDate: {}\r\n", http_1_0 ? 0 : 1, status, view(reason),
                     http_date());
}

HttpResponse response_for(const error_code& error) {
  if (error == http::error::body_limit) {
    return http_error_response(413, "the body is larger than this server accepts",
                               "request_too_large");
  }
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    return http_error_response(431, "the header is larger than this server accepts",
                               "header_too_large");
  }
  return http_error_response(400, "the request is not valid HTTP", "invalid_http");
}

void read_head(const Parser::value_type& message, const HttpHandlers& handlers,
               HttpRequest& request) {
  request.method = view(message.method_string());
  request.target = view(message.target());
  request.authorization = view(message[http::field::authorization]);
  request.content_type = view(message[http::field::content_type]);
  request.if_none_match = view(message[http::field::if_none_match]);
  request.keep_alive = message.keep_alive();
  request.http_1_0 = message.version() < 11;
  if (auto id = sanitize_request_id(view(message["X-Request-Id"])); !id.empty()) {
    request.request_id = std::move(id);
  }
  request.match = handlers.match(request.method, request.target);
}

std::optional<HttpResponse> parse_body(const HttpRequest& request, const HttpHandlers& handlers,
                                       const config::Limits& limits, OpenAiRequest& out) {
  auto body = parse_json(request.body);
  if (!body.ok()) return error_response({body.status()});
  if (!body->is_object()) {
    return error_response({invalid_argument("the body must be a JSON object")});
  }
  auto error = request.match.route == Route::kChatCompletions
                   ? parse_chat_request(body->get_object(), limits, out)
                   : parse_completion_request(body->get_object(), limits, out);
  if (error) return error_response(*error);
  for (GenerateRequest& prompt : out.prompts) {
    prompt.request_id = request.request_id;
    prompt.owner = handlers.owner(request);
  }
  return std::nullopt;
}

}  // namespace

HttpSession::HttpSession(asio::ip::tcp::socket socket, std::shared_ptr<HttpSessionContext> context)
    : socket_(std::move(socket)),
      context_(std::move(context)),
      buffer_(kMaxBufferBytes),
      deadline_(socket_),
      change_(socket_.get_executor()) {}

HttpSession::~HttpSession() { context_->sessions.remove(this); }

void HttpSession::start() {
  error_code ignored;
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(asio::socket_base::keep_alive(true), ignored);
  const auto buffered =
      static_cast<int>(std::min<std::int64_t>(context_->limits.max_buffered_bytes(), 1024 * 1024));
  socket_.set_option(asio::socket_base::send_buffer_size(std::max(buffered, kMinSendBufferBytes)),
                     ignored);
  asio::co_spawn(
      socket_.get_executor(), [self = shared_from_this()] { return self->run(); }, asio::detached);
}

void HttpSession::start_refusal() {
  asio::co_spawn(
      socket_.get_executor(), [self = shared_from_this()] { return self->run_refusal(); },
      asio::detached);
}

void HttpSession::stop_gently() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->stop_gently_ = true;
    error_code ignored;
    if (self->idle_) self->socket_.cancel(ignored);
    if (self->streaming_state_) self->wake();
  });
}

void HttpSession::stop_now() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->stop_gently_ = true;
    self->stop_now_ = true;
    error_code ignored;
    self->socket_.cancel(ignored);
    self->wake();
  });
}

void HttpSession::wake() {
  if (gone() || (generation_ && generation_->overflowed())) {
    // Whatever is being written has no reader.
    error_code ignored;
    socket_.cancel(ignored);
  }
  change_.cancel();
}

HttpSession::Task<void> HttpSession::wait_for_change(Clock::time_point until) {
  change_.expires_at(until);
  co_await change_.async_wait(kAwaitTuple);
}

HttpSession::Task<void> HttpSession::run() {
  bool keep_alive = true;
  while (keep_alive && !stop_gently_) {
    HttpRequest request;
    request.request_id = make_request_id();
    std::optional<HttpResponse> refusal;
    if (!co_await read_request(request, refusal)) break;
    const Clock::time_point began = Clock::now();
    const std::size_t request_bytes = request.body.size();
    bytes_written_ = 0;
    if (refusal) {
      keep_alive = co_await write_response(request, *refusal);
    } else {
      keep_alive = co_await answer(request);
    }
    observe(request, request_bytes, began);
    keep_alive = keep_alive && request.keep_alive && !gone();
  }
  co_await close_gracefully();
}

HttpSession::Task<void> HttpSession::run_refusal() {
  HttpRequest request;
  request.keep_alive = false;
  request.request_id = make_request_id();
  ApiError error{resource_exhausted("the server has too many connections")};
  error.retry_after_ms = 1000;
  const HttpResponse response = error_response(error);
  co_await write_response(request, response);
  co_await close_gracefully();
}

HttpSession::Task<bool> HttpSession::wait_for_request() {
  if (buffer_.size() > 0) co_return true;
  idle_ = true;
  deadline_.arm(context_->limits.idle_timeout_ms(), weak_from_this());
  const auto [error, n] = co_await socket_.async_read_some(buffer_.prepare(4096), kAwaitTuple);
  deadline_.disarm();
  idle_ = false;
  if (error) co_return false;
  buffer_.commit(n);
  co_return true;
}

HttpSession::Task<bool> HttpSession::read_request(HttpRequest& request,
                                                  std::optional<HttpResponse>& refusal) {
  if (!co_await wait_for_request()) co_return false;
  deadline_.arm(context_->limits.read_timeout_ms(), weak_from_this());
  Parser parser;
  parser.header_limit(kMaxHeaderBytes);
  parser.body_limit(static_cast<std::uint64_t>(context_->limits.max_body_bytes()));
  auto [error, n] = co_await http::async_read_header(socket_, buffer_, parser, kAwaitTuple);
  bool body_follows = false;
  if (!error) {
    read_head(parser.get(), context_->handlers, request);
    refusal = context_->handlers.refuse(request);
    const bool asks_first = view(parser.get()[http::field::expect]) == "100-continue";
    const auto length = parser.content_length_remaining();
    body_follows = !parser.is_done();
    if (refusal && body_follows && (asks_first || !length || *length > kMaxDiscardBytes)) {
      request.keep_alive = false;
      deadline_.disarm();
      co_return true;
    }
    if (body_follows && asks_first) co_await write_all("HTTP/1.1 100 Continue\r\n\r\n");
    deadline_.arm(context_->limits.read_timeout_ms(), weak_from_this());
  }
  if (!error && body_follows) {
    auto [body_error, m] = co_await http::async_read(socket_, buffer_, parser, kAwaitTuple);
    error = body_error;
  }
  const bool timed_out = deadline_.passed();
  deadline_.disarm();
  if (!error) {
    request.body = std::move(parser.get().body());
    co_return true;
  }
  request.keep_alive = false;
  if (timed_out) {
    refusal = http_error_response(408, "the request took too long to arrive", "request_timeout");
    co_return true;
  }
  const bool malformed =
      error.category() == http::make_error_code(http::error::end_of_stream).category() &&
      error != http::error::end_of_stream && error != http::error::partial_message;
  if (malformed) refusal = response_for(error);
  co_return malformed;
}

HttpSession::Task<bool> HttpSession::answer(HttpRequest& request) {
  const Route route = request.match.route;
  if (route == Route::kChatCompletions || route == Route::kCompletions) {
    co_return co_await generate(request);
  }
  if (is_admin(route)) co_return co_await administer(request);
  if (route == Route::kEvents) co_return co_await stream_state(request);
  const HttpHandlers& handlers = context_->handlers;
  HttpResponse response;
  if (HttpHandlers::is_heavy(route)) {
    auto work = [&handlers, &request]() -> asio::awaitable<HttpResponse> {
      co_return handlers.handle(request);
    };
    response =
        co_await asio::co_spawn(handlers.service().tokenizer_pool(), work, asio::use_awaitable);
  } else {
    response = handlers.handle(request);
  }
  co_return co_await write_response(request, response);
}

HttpSession::Task<std::optional<HttpResponse>> HttpSession::parse_generation(HttpRequest& request,
                                                                             OpenAiRequest& out) {
  if (request.body.size() <= kMaxInlineParseBytes) {
    co_return parse_body(request, context_->handlers, context_->limits, out);
  }
  auto work = [this, &request, &out]() -> asio::awaitable<std::optional<HttpResponse>> {
    co_return parse_body(request, context_->handlers, context_->limits, out);
  };
  co_return co_await asio::co_spawn(context_->handlers.service().tokenizer_pool(), work,
                                    asio::use_awaitable);
}

HttpSession::Task<bool> HttpSession::generate(HttpRequest& request) {
  CompletionService& service = context_->handlers.service();
  OpenAiRequest parsed;
  if (auto refusal = co_await parse_generation(request, parsed)) {
    co_return co_await write_response(request, *refusal);
  }
  request.body = std::string();
  const std::int64_t created = std::chrono::duration_cast<std::chrono::seconds>(
                                   std::chrono::system_clock::now().time_since_epoch())
                                   .count();
  OpenAiWriter writer(parsed, request.request_id, created, service.config().served_model_name);
  auto generation = std::make_shared<HttpGeneration>(
      std::move(parsed), std::move(writer),
      static_cast<std::size_t>(context_->limits.max_buffered_bytes()), [this] { wake(); });
  generation_ = generation;
  generation->start(service, socket_.get_executor());
  watch_client();
  const auto ready = [&] {
    return generation->finished() || (generation->stream() && generation->accepted());
  };
  while (!ready() && !gone()) co_await wait_for_change(Clock::time_point::max());

  bool keep = false;
  if (!gone()) {
    if (generation->stream() && generation->accepted()) {
      keep = co_await stream_output(request, *generation);
    } else if (generation->error()) {
      keep = co_await write_response(request, error_response(*generation->error()));
    } else {
      keep = co_await write_response(request, json_response(generation->body()));
    }
  }
  generation->abandon();
  generation_.reset();
  co_await end_watch();
  co_return keep;
}

HttpSession::Task<bool> HttpSession::stream_output(const HttpRequest& request,
                                                   HttpGeneration& generation) {
  count(request, 200);
  bool writable = co_await write_all(stream_head(request, kEventStream));
  const auto ping_interval =
      std::chrono::milliseconds(context_->handlers.options().ping_interval_ms);
  while (writable && !gone() && !generation.overflowed()) {
    const std::string events = generation.take_events();
    if (!events.empty()) {
      writable = co_await write_chunk(request, events);
      continue;
    }
    if (generation.finished()) {
      // Without chunks the end of the connection ends the body.
      if (request.http_1_0) co_return false;
      co_return co_await write_all("0\r\n\r\n");
    }
    const Clock::time_point until = Clock::now() + ping_interval;
    co_await wait_for_change(until);
    if (Clock::now() >= until) writable = co_await write_chunk(request, OpenAiWriter::kPing);
  }
  co_return false;
}

void HttpSession::watch_client() {
  if (buffer_.size() >= kMaxPipelinedBytes) {
    watching_ = false;
    return;
  }
  watching_ = true;
  socket_.async_read_some(
      buffer_.prepare(4096),
      asio::bind_cancellation_slot(
          watch_cancel_.slot(), [self = shared_from_this()](error_code error, std::size_t n) {
            self->watching_ = false;
            if (!error) self->buffer_.commit(n);
            if (error && error != asio::error::operation_aborted) self->client_gone_ = true;
            if (!error && (self->generation_ || self->administering_ || self->streaming_state_)) {
              self->watch_client();
            } else {
              self->wake();
            }
          }));
}

HttpSession::Task<void> HttpSession::end_watch() {
  watch_cancel_.emit(asio::cancellation_type::terminal);
  while (watching_) co_await wait_for_change(Clock::time_point::max());
}

HttpSession::Task<bool> HttpSession::write_all(std::string_view data) {
  while (!data.empty()) {
    deadline_.arm(context_->limits.write_timeout_ms(), weak_from_this());
    const auto [error, n] =
        co_await socket_.async_write_some(asio::buffer(data.data(), data.size()), kAwaitTuple);
    if (error) {
      deadline_.disarm();
      client_gone_ = true;
      co_return false;
    }
    data.remove_prefix(n);
    bytes_written_ += n;
  }
  deadline_.disarm();
  co_return true;
}

HttpSession::Task<bool> HttpSession::write_chunk(const HttpRequest& request,
                                                 std::string_view data) {
  if (request.http_1_0) co_return co_await write_all(data);
  std::string chunk = fmt::format("{:x}\r\n", data.size());
  chunk += data;
  chunk += "\r\n";
  co_return co_await write_all(chunk);
}

void HttpSession::count(const HttpRequest& request, int status) const {
  context_->handlers.service().metrics().count_http_request(request.match.handler, request.method,
                                                            status);
}

void HttpSession::observe(const HttpRequest& request, std::size_t request_bytes,
                          Clock::time_point began) const {
  const std::chrono::duration<double> took = Clock::now() - began;
  context_->handlers.service().metrics().observe_http_request(
      request.match.handler, {took.count(), request_bytes, bytes_written_});
}

std::string HttpSession::response_head(const HttpRequest& request, const HttpResponse& response,
                                       bool keep_alive) const {
  std::string head = status_line(response.status, request.http_1_0);
  if (response.status != 204 && response.status != 304) {  // these have no body
    head += fmt::format("Content-Type: {}\r\nContent-Length: {}\r\n", response.content_type,
                        response.body.size());
  }
  head += fmt::format("X-Request-Id: {}\r\nConnection: {}\r\n", request.request_id,
                      keep_alive ? "keep-alive" : "close");
  for (const auto& [name, value] : response.headers) head += fmt::format("{}: {}\r\n", name, value);
  head += "\r\n";
  return head;
}

std::string HttpSession::stream_head(const HttpRequest& request,
                                     std::string_view content_type) const {
  const bool keep_alive = request.keep_alive && !stop_gently_ && !request.http_1_0;
  return status_line(200, request.http_1_0) +
         fmt::format(
             "Content-Type: {}\r\nCache-Control: no-cache\r\n"
             "X-Accel-Buffering: no\r\nX-Request-Id: {}\r\n{}Connection: {}\r\n\r\n",
             content_type, request.request_id,
             request.http_1_0 ? "" : "Transfer-Encoding: chunked\r\n",
             keep_alive ? "keep-alive" : "close");
}

HttpSession::Task<bool> HttpSession::write_response(const HttpRequest& request,
                                                    const HttpResponse& response) {
  count(request, response.status);
  const bool keep_alive = request.keep_alive && !stop_gently_;
  std::string text = response_head(request, response, keep_alive);
  if (request.method != "HEAD") text += response.body;
  co_return co_await write_all(text) && keep_alive;
}

// Closing a socket with unread input resets the connection, and the client may lose the answer. So:
// say that nothing more comes, and read what the client still sends, for a while.
HttpSession::Task<void> HttpSession::close_gracefully() {
  error_code ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  deadline_.arm(kLingerMs, weak_from_this());
  std::array<char, 4096> scratch;
  std::size_t n_read = 0;
  while (!gone() && n_read < kMaxLingerBytes) {
    const auto [error, n] = co_await socket_.async_read_some(asio::buffer(scratch), kAwaitTuple);
    if (error) break;
    n_read += n;
  }
  deadline_.disarm();
  socket_.close(ignored);
}

}  // namespace spindle::api
