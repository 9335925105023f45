#include "worker/model/json_stream.h"

#include <algorithm>
#include <boost/json/basic_parser_impl.hpp>
#include <limits>
#include <string>

namespace spindle::model {
namespace {

namespace json = boost::json;

// Adapts the parser's callbacks to a JsonSink: joins split keys and strings up to their limits and
// keeps the sink's Status, which the parser's error codes could not carry.
class Events {
 public:
  static constexpr std::size_t max_object_size = std::numeric_limits<std::size_t>::max();
  static constexpr std::size_t max_array_size = std::numeric_limits<std::size_t>::max();
  static constexpr std::size_t max_key_size = std::numeric_limits<std::size_t>::max();
  static constexpr std::size_t max_string_size = std::numeric_limits<std::size_t>::max();

  Events(JsonSink& sink, const JsonLimits& limits) : sink_(sink), limits_(limits) {}

  const Status& failure() const { return failure_; }

  bool on_document_begin(json::error_code&) { return true; }
  bool on_document_end(json::error_code&) { return true; }
  bool on_object_begin(json::error_code& ec) { return pass(sink_.on_object_begin(), ec); }
  bool on_object_end(std::size_t, json::error_code& ec) { return pass(sink_.on_object_end(), ec); }
  bool on_array_begin(json::error_code& ec) { return pass(sink_.on_array_begin(), ec); }
  bool on_array_end(std::size_t, json::error_code& ec) { return pass(sink_.on_array_end(), ec); }

  bool on_key_part(json::string_view part, std::size_t total_bytes, json::error_code& ec) {
    if (total_bytes > limits_.max_key_bytes) {
      return pass(
          too_large("a name is longer than " + std::to_string(limits_.max_key_bytes) + " bytes"),
          ec);
    }
    text_.append(part.data(), part.size());
    return true;
  }
  bool on_key(json::string_view part, std::size_t total_bytes, json::error_code& ec) {
    if (!on_key_part(part, total_bytes, ec)) return false;
    const Status status = sink_.on_key(text_);
    text_.clear();
    return pass(status, ec);
  }
  bool on_string_part(json::string_view part, std::size_t, json::error_code&) {
    const std::size_t room = limits_.max_string_bytes - text_.size();
    text_.append(part.data(), std::min<std::size_t>(room, part.size()));
    return true;
  }
  bool on_string(json::string_view part, std::size_t total_bytes, json::error_code& ec) {
    on_string_part(part, total_bytes, ec);
    const Status status = sink_.on_string(text_, total_bytes);
    text_.clear();
    return pass(status, ec);
  }

  bool on_number_part(json::string_view, json::error_code&) { return true; }
  bool on_int64(std::int64_t value, json::string_view, json::error_code& ec) {
    return pass(value < 0 ? sink_.on_other("a negative number")
                          : sink_.on_unsigned(static_cast<std::uint64_t>(value)),
                ec);
  }
  bool on_uint64(std::uint64_t value, json::string_view, json::error_code& ec) {
    return pass(sink_.on_unsigned(value), ec);
  }
  bool on_double(double, json::string_view, json::error_code& ec) {
    return pass(sink_.on_other("a number that is not a 64-bit integer"), ec);
  }
  bool on_bool(bool, json::error_code& ec) { return pass(sink_.on_other("a boolean"), ec); }
  bool on_null(json::error_code& ec) { return pass(sink_.on_other("null"), ec); }
  bool on_comment_part(json::string_view, json::error_code&) { return true; }
  bool on_comment(json::string_view, json::error_code&) { return true; }

 private:
  bool pass(Status status, json::error_code& ec) {
    if (status.ok()) return true;
    failure_ = std::move(status);
    ec = json::error::syntax;
    return false;
  }

  JsonSink& sink_;
  JsonLimits limits_;
  std::string text_;
  Status failure_;
};

json::parse_options options(const JsonLimits& limits) {
  json::parse_options result;
  result.max_depth = limits.max_depth;
  return result;
}

}  // namespace

class JsonStream::Impl {
 public:
  Impl(JsonSink& sink, const JsonLimits& limits)
      : parser_(options(limits), sink, limits), max_depth_(limits.max_depth) {}

  Status write(bool more, std::string_view chunk) {
    if (!failed_.ok()) return failed_;
    json::error_code ec;
    const std::size_t used = parser_.write_some(more, chunk.data(), chunk.size(), ec);
    fed_bytes_ += used;
    if (!ec && used < chunk.size()) ec = json::error::extra_data;
    if (ec) failed_ = describe(ec);
    return failed_;
  }

 private:
  Status describe(const json::error_code& ec) const {
    if (!parser_.handler().failure().ok()) return parser_.handler().failure();
    if (ec == json::error::too_deep) {
      return invalid_argument("JSON is nested deeper than " + std::to_string(max_depth_) +
                              " levels");
    }
    return invalid_argument("not valid JSON near byte " + std::to_string(fed_bytes_) + ": " +
                            ec.message());
  }

  json::basic_parser<Events> parser_;
  std::size_t max_depth_;
  std::uint64_t fed_bytes_ = 0;
  Status failed_;
};

JsonStream::JsonStream(JsonSink& sink, JsonLimits limits)
    : impl_(std::make_unique<Impl>(sink, limits)) {}
JsonStream::~JsonStream() = default;

Status JsonStream::feed(std::string_view chunk) { return impl_->write(true, chunk); }
Status JsonStream::finish() { return impl_->write(false, {}); }

}  // namespace spindle::model
