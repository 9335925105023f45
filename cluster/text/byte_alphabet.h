#pragma once
// The byte alphabet of byte-level BPE: each of the 256 bytes is written as one printable character,
// so that a vocabulary of arbitrary byte strings fits into JSON. Printable Latin-1 bytes stand for
// themselves, the other 68 for U+0100 upward in order of their value ("Ġ" is the space).

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace spindle::text {

class ByteAlphabet {
 public:
  static char32_t to_character(std::uint8_t byte);
  // The byte a character stands for, if it is in the alphabet.
  static std::optional<std::uint8_t> to_byte(char32_t character);
  // The bytes that a vocabulary entry (valid UTF-8) stands for, or nothing if it holds a character
  // outside the alphabet.
  static std::optional<std::string> to_bytes(std::string_view token);
};

}  // namespace spindle::text
