#include "cluster/api/json_text.h"

#include <array>
#include <charconv>
#include <cmath>

#include "cluster/text/utf8.h"

namespace spindle::api {
namespace {

constexpr std::string_view kHexDigits = "0123456789abcdef";

bool needs_escape(char c) { return static_cast<unsigned char>(c) < 0x20 || c == '"' || c == '\\'; }

void append_escape(std::string& out, char c) {
  switch (c) {
    case '"':
      out += "\\\"";
      return;
    case '\\':
      out += "\\\\";
      return;
    case '\n':
      out += "\\n";
      return;
    case '\r':
      out += "\\r";
      return;
    case '\t':
      out += "\\t";
      return;
    default:
      out += "\\u00";
      out += kHexDigits[static_cast<unsigned char>(c) >> 4];
      out += kHexDigits[static_cast<unsigned char>(c) & 0xF];
  }
}

void append_escaped(std::string& out, std::string_view valid) {
  std::size_t plain = 0;
  for (std::size_t i = 0; i < valid.size(); ++i) {
    if (!needs_escape(valid[i])) continue;
    out.append(valid, plain, i - plain);
    append_escape(out, valid[i]);
    plain = i + 1;
  }
  out.append(valid, plain, valid.size() - plain);
}

template <typename Number>
void append_number(std::string& out, Number value) {
  std::array<char, 32> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value);
  out.append(digits.data(), end.ptr);
}

}  // namespace

void append_json_string(std::string& out, std::string_view text) {
  out += '"';
  if (text::find_invalid_utf8(text)) {
    std::string repaired;
    text::LossyUtf8Decoder decoder;
    decoder.feed(text, repaired);
    decoder.finish(repaired);
    append_escaped(out, repaired);
  } else {
    append_escaped(out, text);
  }
  out += '"';
}

void append_json_string_or_null(std::string& out, std::string_view text) {
  if (text.empty()) {
    out += "null";
  } else {
    append_json_string(out, text);
  }
}

void append_json_integer(std::string& out, std::int64_t value) { append_number(out, value); }

void append_json_logprob(std::string& out, float value) {
  append_number(out, std::isfinite(value) ? value : -9999.0F);
}

}  // namespace spindle::api
