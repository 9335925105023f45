#pragma once
// UTF-8 as Spindle needs it: strict validation of input, lossy decoding of model output, and code
// point access for strings already known to be valid.
//
// "Valid" is the Unicode definition: no surrogates, no overlong forms, nothing above U+10FFFF.

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace spindle::text {

// The byte offset of the first invalid (or cut off) sequence, or nothing if all is valid.
std::optional<std::size_t> find_invalid_utf8(std::string_view bytes);

void append_utf8(std::string& out, char32_t code_point);

// Decodes the character that starts at `offset` of a valid string and moves `offset` past it.
char32_t next_code_point(std::string_view valid, std::size_t& offset);

// The last character of a valid, non-empty string.
char32_t last_code_point(std::string_view valid);

// Length of the sequence that a valid lead byte opens.
constexpr std::size_t utf8_sequence_bytes(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

// Number of code points in a valid string.
std::size_t count_code_points(std::string_view valid);

// Unicode White_Space, and the same set plus the four ASCII separators, which is what Python's
// str.strip and str.split call white space.
bool is_white_space(char32_t code_point);
bool is_python_white_space(char32_t code_point);

// Turns a stream of arbitrary bytes into valid UTF-8. Each maximal invalid part becomes one U+FFFD,
// as in Python's bytes.decode("utf-8", errors="replace"), however the stream is cut into pieces.
//
// Thread-safety: none; one decoder per stream. Invariant: the tail is an incomplete sequence that
// may still become valid, so it has at most three bytes.
class LossyUtf8Decoder {
 public:
  // Appends to `out` all characters that are complete after `bytes`.
  void feed(std::string_view bytes, std::string& out);
  // Appends U+FFFD for a held incomplete sequence, and is ready for a new stream.
  void finish(std::string& out);

 private:
  std::array<char, 4> tail_{};
  std::size_t tail_bytes_ = 0;
};

}  // namespace spindle::text
