#include "cluster/api/framing.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/coded_stream.h>

#include <limits>
#include <utility>

namespace spindle::api {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::io::CodedInputStream;

// Buffers larger than this are given back once they are empty.
constexpr std::size_t kKeptBufferBytes = 64U << 10U;
// The schema nests five deep.
constexpr int kMaxDepth = 16;

enum class Shape { kFine, kMalformed, kTooManyElements };

enum WireType : std::uint32_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

// Numbers in their own fields cost what they take on the wire; everything else is counted.
bool is_element(const FieldDescriptor* field, std::uint32_t wire_type) {
  if (field == nullptr || wire_type == kLengthDelimited) {
    return true;
  }
  const FieldDescriptor::CppType type = field->cpp_type();
  return type == FieldDescriptor::CPPTYPE_STRING || type == FieldDescriptor::CPPTYPE_MESSAGE;
}

// Walks one message's fields without building anything. `budget` is the number of elements left.
Shape check_shape(CodedInputStream& in, const Descriptor& type, int depth, std::int64_t& budget) {
  if (depth > kMaxDepth) {
    return Shape::kMalformed;
  }
  for (std::uint32_t tag = in.ReadTag(); tag != 0; tag = in.ReadTag()) {
    const FieldDescriptor* field = type.FindFieldByNumber(static_cast<int>(tag >> 3U));
    const std::uint32_t wire_type = tag & 7U;
    if (is_element(field, wire_type) && --budget < 0) {
      return Shape::kTooManyElements;
    }
    std::uint64_t value = 0;
    switch (wire_type) {
      case kVarint:
        if (!in.ReadVarint64(&value)) {
          return Shape::kMalformed;
        }
        break;
      case kFixed64:
      case kFixed32:
        if (!in.Skip(wire_type == kFixed64 ? 8 : 4)) {
          return Shape::kMalformed;
        }
        break;
      case kLengthDelimited: {
        if (!in.ReadVarint64(&value) || value > std::numeric_limits<std::int32_t>::max()) {
          return Shape::kMalformed;
        }
        const int n_bytes = static_cast<int>(value);
        if (field == nullptr || field->type() != FieldDescriptor::TYPE_MESSAGE) {
          if (!in.Skip(n_bytes)) {
            return Shape::kMalformed;
          }
          break;
        }
        const CodedInputStream::Limit limit = in.PushLimit(n_bytes);
        const Shape inner = check_shape(in, *field->message_type(), depth + 1, budget);
        if (inner != Shape::kFine) {
          return inner;
        }
        if (in.BytesUntilLimit() != 0) {
          return Shape::kMalformed;
        }
        in.PopLimit(limit);
        break;
      }
      default:  // groups are not part of proto3
        return Shape::kMalformed;
    }
  }
  return Shape::kFine;
}

std::uint32_t read_length(const char* bytes) {
  std::uint32_t length = 0;
  for (unsigned i = 0; i < kFrameHeaderBytes; ++i) {
    length |= static_cast<std::uint32_t>(static_cast<unsigned char>(bytes[i])) << (8U * i);
  }
  return length;
}

}  // namespace

Status append_frame(const v1::Frame& frame, std::size_t max_frame_bytes, std::string& out) {
  const std::size_t n_bytes = frame.ByteSizeLong();
  if (n_bytes > max_frame_bytes || n_bytes > std::numeric_limits<std::int32_t>::max()) {
    return too_large("the message has " + std::to_string(n_bytes) + " bytes; a frame may have " +
                     std::to_string(max_frame_bytes));
  }
  for (unsigned i = 0; i < kFrameHeaderBytes; ++i) {
    out.push_back(static_cast<char>((n_bytes >> (8U * i)) & 0xFFU));
  }
  frame.AppendToString(&out);
  return ok_status();
}

void FrameDecoder::feed(std::string_view bytes) {
  if (!error_.ok()) {
    return;
  }
  if (consumed_ > 0) {
    buffer_.erase(0, consumed_);
    consumed_ = 0;
  }
  buffer_.append(bytes);
}

Status FrameDecoder::fail(Status error) {
  error_ = std::move(error);
  buffer_ = std::string();
  consumed_ = 0;
  return error_;
}

Result<std::optional<v1::Frame>> FrameDecoder::next() {
  if (!error_.ok()) {
    return error_;
  }
  const std::size_t held = buffer_.size() - consumed_;
  if (held < kFrameHeaderBytes) {
    return std::optional<v1::Frame>();
  }
  const std::size_t n_bytes = read_length(buffer_.data() + consumed_);
  if (n_bytes > max_frame_bytes_ || n_bytes > std::numeric_limits<std::int32_t>::max()) {
    return fail(too_large("a frame of " + std::to_string(n_bytes) +
                          " bytes was announced; the limit is " +
                          std::to_string(max_frame_bytes_)));
  }
  if (held - kFrameHeaderBytes < n_bytes) {
    return std::optional<v1::Frame>();
  }
  const char* body = buffer_.data() + consumed_ + kFrameHeaderBytes;
  CodedInputStream in(reinterpret_cast<const std::uint8_t*>(body), static_cast<int>(n_bytes));
  std::int64_t budget = kMaxFrameElements;
  const Shape shape = check_shape(in, *v1::Frame::descriptor(), 0, budget);
  if (shape == Shape::kTooManyElements) {
    return fail(invalid_argument("the frame has more than " + std::to_string(kMaxFrameElements) +
                                 " strings and messages"));
  }
  v1::Frame frame;
  if (shape != Shape::kFine || static_cast<std::size_t>(in.CurrentPosition()) != n_bytes ||
      !frame.ParseFromArray(body, static_cast<int>(n_bytes))) {
    return fail(invalid_argument("the bytes are not a Frame message"));
  }
  consumed_ += kFrameHeaderBytes + n_bytes;
  if (consumed_ == buffer_.size()) {
    consumed_ = 0;
    buffer_.clear();
    if (buffer_.capacity() > kKeptBufferBytes) {
      buffer_ = std::string();
    }
  }
  return std::optional<v1::Frame>(std::move(frame));
}

}  // namespace spindle::api
