#include "cluster/text/utf8.h"

namespace spindle::text {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

enum class Form { kValid, kInvalid, kIncomplete };

struct Sequence {
  Form form;
  std::size_t n_bytes;  // valid: the character; invalid: the maximal invalid part
};

// Unicode 15, table 3-7: the second byte's range depends on the lead byte.
Sequence scan_sequence(std::string_view bytes, std::size_t offset) {
  const auto lead = static_cast<unsigned char>(bytes[offset]);
  if (lead < 0x80) return {Form::kValid, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Form::kInvalid, 1};
  const std::size_t n_bytes = utf8_sequence_bytes(lead);
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (std::size_t i = 1; i < n_bytes; ++i) {
    if (offset + i >= bytes.size()) return {Form::kIncomplete, i};
    const auto byte = static_cast<unsigned char>(bytes[offset + i]);
    if (byte < low || byte > high) return {Form::kInvalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Form::kValid, n_bytes};
}

}  // namespace

std::optional<std::size_t> find_invalid_utf8(std::string_view bytes) {
  std::size_t offset = 0;
  while (offset < bytes.size()) {
    const Sequence sequence = scan_sequence(bytes, offset);
    if (sequence.form != Form::kValid) return offset;
    offset += sequence.n_bytes;
  }
  return std::nullopt;
}

void append_utf8(std::string& out, char32_t code_point) {
  const auto put = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

char32_t next_code_point(std::string_view valid, std::size_t& offset) {
  const auto lead = static_cast<unsigned char>(valid[offset]);
  const std::size_t n_bytes = utf8_sequence_bytes(lead);
  if (n_bytes == 1) {
    ++offset;
    return lead;
  }
  char32_t code_point = lead & (0xFFu >> (n_bytes + 1));
  for (std::size_t i = 1; i < n_bytes && offset + i < valid.size(); ++i) {
    code_point = (code_point << 6) | (static_cast<unsigned char>(valid[offset + i]) & 0x3Fu);
  }
  offset += n_bytes;
  return code_point;
}

char32_t last_code_point(std::string_view valid) {
  std::size_t offset = valid.size() - 1;
  while (offset > 0 && (static_cast<unsigned char>(valid[offset]) & 0xC0u) == 0x80u) --offset;
  return next_code_point(valid, offset);
}

std::size_t count_code_points(std::string_view valid) {
  std::size_t n = 0;
  for (const char c : valid) n += (static_cast<unsigned char>(c) & 0xC0u) != 0x80u;
  return n;
}

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_python_white_space(char32_t c) { return is_white_space(c) || (c >= 0x1C && c <= 0x1F); }

void LossyUtf8Decoder::feed(std::string_view bytes, std::string& out) {
  std::string joined;
  if (tail_bytes_ > 0) {
    joined.reserve(tail_bytes_ + bytes.size());
    joined.append(tail_.data(), tail_bytes_).append(bytes);
    bytes = joined;
    tail_bytes_ = 0;
  }
  std::size_t offset = 0;
  while (offset < bytes.size()) {
    const Sequence sequence = scan_sequence(bytes, offset);
    if (sequence.form == Form::kIncomplete) {
      tail_bytes_ = bytes.copy(tail_.data(), tail_.size(), offset);
      return;
    }
    if (sequence.form == Form::kValid) {
      out.append(bytes, offset, sequence.n_bytes);
    } else {
      out.append(kReplacement);
    }
    offset += sequence.n_bytes;
  }
}

void LossyUtf8Decoder::finish(std::string& out) {
  if (tail_bytes_ > 0) out.append(kReplacement);
  tail_bytes_ = 0;
}

}  // namespace spindle::text
