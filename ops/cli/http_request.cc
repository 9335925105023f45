#include "ops/cli/http_request.h"

#include <unistd.h>

#include <array>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/buffer_body.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <boost/beast/http/write.hpp>
#include <boost/json.hpp>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "ops/cli/exit_codes.h"
#include "ops/cli/input.h"
#include "ops/cli/output.h"

namespace spindle::cli {
namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using boost::system::error_code;

namespace {

constexpr std::size_t kMaxErrorBytes = 64 * 1024;

std::chrono::milliseconds to_ms(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::ceil(seconds * 1000)));
}

// One connection and one request, driven by this thread alone: every operation is started, and the
// context is run until it is done or the descriptor became readable.
class Post {
 public:
  Post(const ConnectionOptions& options, int cancel_fd) : options_(options), stream_(io_) {
    if (cancel_fd < 0) return;
    cancel_.emplace(io_, ::dup(cancel_fd));
    cancel_->async_wait(asio::posix::stream_descriptor::wait_read, [this](const error_code& error) {
      if (error) return;
      cancelled_ = true;
      stream_.close();
    });
  }

  HttpAnswer run(const std::string& target, const std::string& body,
                 std::chrono::milliseconds quiet,
                 const std::function<bool(std::string_view)>& on_data) {
    HttpAnswer answer;
    answer.failure = connect();
    if (!answer.failure.ok()) return answer;
    answer.failure = exchange(target, body, quiet, on_data, answer);
    if (!answer.failure.ok()) answer.status = 0;
    return answer;
  }

 private:
  // Runs until `error` is anything else than would_block.
  void wait(error_code& error) {
    io_.restart();
    while (error == asio::error::would_block && io_.run_one() > 0) {
    }
  }

  Status broken(const error_code& error) const {
    if (cancelled_) return cancelled("interrupted");
    if (error == beast::error::timeout)
      return deadline_exceeded("the server did not answer in time");
    return internal_error("the connection broke: " + error.message());
  }

  std::string where() const { return options_.host + ":" + std::to_string(options_.port); }

  Status connect() {
    error_code error;
    asio::ip::tcp::resolver resolver(io_);
    const auto found = resolver.resolve(options_.host, std::to_string(options_.port), error);
    if (error) return unavailable("cannot find " + options_.host + ": " + error.message());
    stream_.expires_after(to_ms(options_.connect_timeout_s));
    error = asio::error::would_block;
    stream_.async_connect(found, [&error](const error_code& e, const auto&) { error = e; });
    wait(error);
    if (!error) return ok_status();
    if (cancelled_) return cancelled("interrupted");
    if (error == beast::error::timeout) {
      return deadline_exceeded(where() + " did not answer in time");
    }
    return unavailable("cannot reach " + where() + " (" + error.message() + ")");
  }

  Status exchange(const std::string& target, const std::string& body,
                  std::chrono::milliseconds quiet,
                  const std::function<bool(std::string_view)>& on_data, HttpAnswer& answer) {
    http::request<http::string_body> request(http::verb::post, target, 11);
    request.set(http::field::host, where());
    request.set(http::field::content_type, "application/json");
    if (!options_.api_key.empty()) {
      request.set(http::field::authorization, "Bearer " + options_.api_key);
    }
    request.keep_alive(false);
    request.body() = body;
    request.prepare_payload();
    error_code error = asio::error::would_block;
    const auto done = [&error](const error_code& e, std::size_t) { error = e; };
    stream_.expires_after(to_ms(options_.timeout_s));
    http::async_write(stream_, request, done);
    wait(error);
    if (error) return broken(error);

    beast::flat_buffer buffer;
    http::response_parser<http::buffer_body> parser;
    parser.body_limit(std::numeric_limits<std::uint64_t>::max());  // it goes on as it comes
    stream_.expires_after(to_ms(options_.timeout_s) + quiet);
    error = asio::error::would_block;
    http::async_read_header(stream_, buffer, parser, done);
    wait(error);
    if (error) return broken(error);
    answer.status = parser.get().result_int();

    std::array<char, 65536> piece;
    while (!parser.is_done()) {
      parser.get().body().data = piece.data();
      parser.get().body().size = piece.size();
      stream_.expires_after(to_ms(options_.timeout_s));
      error = asio::error::would_block;
      http::async_read(stream_, buffer, parser, done);
      wait(error);
      if (error && error != http::error::need_buffer) return broken(error);
      const std::string_view data(piece.data(), piece.size() - parser.get().body().size);
      if (answer.status == 200) {
        if (!on_data(data)) return cancelled("the output could not be written");
      } else if (answer.body.size() + data.size() <= kMaxErrorBytes) {
        answer.body += data;
      }
    }
    return ok_status();
  }

  const ConnectionOptions& options_;
  asio::io_context io_{1};
  beast::tcp_stream stream_;
  std::optional<asio::posix::stream_descriptor> cancel_;
  bool cancelled_ = false;
};

// The message of an OpenAI error object, or the body's beginning.
std::string message_of(const std::string& body) {
  error_code error;
  const boost::json::value value = boost::json::parse(body, error);
  if (!error && value.is_object()) {
    const auto* object = value.as_object().if_contains("error");
    const auto* message = object != nullptr && object->is_object()
                              ? object->as_object().if_contains("message")
                              : nullptr;
    if (message != nullptr && message->is_string()) return std::string(message->as_string());
  }
  return body.substr(0, 200);
}

}  // namespace

HttpAnswer http_post(const ConnectionOptions& options, const std::string& target,
                     const std::string& body, std::chrono::milliseconds quiet, int cancel_fd,
                     const std::function<bool(std::string_view data)>& on_data) {
  HttpAnswer answer;
  if (options.api_key.find_first_of("\r\n") != std::string::npos) {
    answer.failure = invalid_argument("the API key contains a line break");
    return answer;
  }
  return Post(options, cancel_fd).run(target, body, quiet, on_data);
}

int report_http_failure(const HttpAnswer& answer, const ConnectionOptions& options) {
  switch (answer.failure.code()) {
    case StatusCode::kOk:
      break;
    case StatusCode::kCancelled:
      print_error(answer.failure.message());
      return kExitInterrupted;
    case StatusCode::kUnavailable:
      print_error(answer.failure.message() + ". Is spindled running?");
      return kExitCannotConnect;
    case StatusCode::kInvalidArgument:
      return report_usage_error(answer.failure);
    default:
      print_error(answer.failure.message());
      return kExitRequestFailed;
  }
  const std::string message = message_of(answer.body);
  if (answer.status == 401) {
    print_error(message + ". Set --api-key or the variable SPINDLE_API_KEY.");
    return kExitCannotConnect;
  }
  if (answer.status == 404) {
    print_error(options.host + ":" + std::to_string(options.port) +
                " does not know this order: is it Spindle's HTTP port?");
    return kExitCannotConnect;
  }
  print_error(message);
  return answer.status == 400 ? kExitUsage : kExitRequestFailed;
}

}  // namespace spindle::cli
