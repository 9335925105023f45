#include "worker/model/printable.h"

#include <cstddef>
#include <utility>

namespace spindle::model {
namespace {

constexpr std::size_t kMaxShownBytes = 96;

}  // namespace

std::string in_quotes(std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text.substr(0, kMaxShownBytes)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f) {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15u];
    } else {
      out += c;
    }
  }
  if (text.size() > kMaxShownBytes) out += "...";
  return out + "\"";
}

std::string shortened(std::string text) {
  if (text.size() <= kMaxShownBytes) return text;
  text.resize(kMaxShownBytes);
  return std::move(text) + "...";
}

}  // namespace spindle::model
