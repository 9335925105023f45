#include "worker/logging/one_line.h"

#include <fmt/format.h>

#include "cluster/text/utf8.h"

namespace spindle::worker {
namespace {

// C0, DEL, C1, line and paragraph separators, and the marks that change the direction of writing.
bool is_unsafe(char32_t c) {
  return c < 0x20 || (c >= 0x7F && c < 0xA0) || c == 0x2028 || c == 0x2029 || c == 0x200E ||
         c == 0x200F || (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
}

void append_escaped(std::string& out, char32_t c) {
  const auto code = static_cast<unsigned>(c);
  switch (c) {
    case '\n':
      out += "\\n";
      break;
    case '\r':
      out += "\\r";
      break;
    case '\t':
      out += "\\t";
      break;
    default:
      out += code < 0x80 ? fmt::format("\\x{:02x}", code) : fmt::format("\\u{:04x}", code);
  }
}

}  // namespace

std::string one_line(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  while (!bytes.empty()) {
    const std::string_view valid =
        bytes.substr(0, text::find_invalid_utf8(bytes).value_or(bytes.size()));
    for (std::size_t at = 0; at < valid.size();) {
      const char32_t c = text::next_code_point(valid, at);
      if (is_unsafe(c)) {
        append_escaped(out, c);
      } else {
        text::append_utf8(out, c);
      }
    }
    bytes.remove_prefix(valid.size());
    if (bytes.empty()) break;
    out += fmt::format("\\x{:02x}", static_cast<unsigned>(static_cast<unsigned char>(bytes[0])));
    bytes.remove_prefix(1);
  }
  return out;
}

std::string cut_text(std::string_view text, std::size_t max_bytes) {
  if (text.size() <= max_bytes) return std::string(text);
  std::size_t end = max_bytes;
  const auto continues = [&](std::size_t at) {
    return (static_cast<unsigned char>(text[at]) & 0xC0U) == 0x80U;
  };
  for (int back = 0; back < 3 && end > 0 && continues(end); ++back) --end;
  return std::string(text.substr(0, end)) + "...";
}

}  // namespace spindle::worker
