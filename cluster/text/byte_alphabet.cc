#include "cluster/text/byte_alphabet.h"

#include <array>
#include <cstddef>

#include "cluster/text/utf8.h"

namespace spindle::text {
namespace {

constexpr bool stands_for_itself(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr std::array<char32_t, 256> kCharacters = [] {
  std::array<char32_t, 256> characters{};
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    characters[byte] = stands_for_itself(byte) ? byte : next++;
  }
  return characters;
}();

constexpr std::int16_t kNoByte = -1;
constexpr std::array<std::int16_t, 0x100 + 68> kBytes = [] {
  std::array<std::int16_t, 0x100 + 68> bytes{};
  bytes.fill(kNoByte);
  for (unsigned byte = 0; byte < 256; ++byte) {
    bytes[kCharacters[byte]] = static_cast<std::int16_t>(byte);
  }
  return bytes;
}();

}  // namespace

char32_t ByteAlphabet::to_character(std::uint8_t byte) { return kCharacters[byte]; }

std::optional<std::uint8_t> ByteAlphabet::to_byte(char32_t character) {
  if (character >= kBytes.size() || kBytes[character] == kNoByte) return std::nullopt;
  return static_cast<std::uint8_t>(kBytes[character]);
}

std::optional<std::string> ByteAlphabet::to_bytes(std::string_view token) {
  std::string bytes;
  bytes.reserve(token.size());
  for (std::size_t offset = 0; offset < token.size();) {
    const auto byte = to_byte(next_code_point(token, offset));
    if (!byte) return std::nullopt;
    bytes.push_back(static_cast<char>(*byte));
  }
  return bytes;
}

}  // namespace spindle::text
