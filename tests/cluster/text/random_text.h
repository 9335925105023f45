#pragma once
// Random valid UTF-8 with the features that trouble tokenizers: runs of spaces and newlines,
// combining marks, emoji sequences, digits, every plane.

#include <array>
#include <random>
#include <string>

#include "cluster/text/utf8.h"

namespace spindle::text {

inline char32_t random_code_point(std::mt19937_64& random) {
  const auto below = [&random](std::uint64_t n) { return static_cast<char32_t>(random() % n); };
  switch (below(10)) {
    case 0:
      return U' ';
    case 1: {
      constexpr std::array<char32_t, 8> kSpaces = {U'\n', U'\r', U'\t',  U' ',
                                                   0xA0,  0x85,  0x2003, 0x3000};
      return kSpaces[below(kSpaces.size())];
    }
    case 2:
      return U'0' + below(10);
    case 3:
      return below(0x80);
    case 4:
      return 0xA0 + below(0x600);
    case 5:
      return 0x4E00 + below(0x5000);
    case 6:
      return 0x1F300 + below(0x400);
    case 7: {
      const char32_t any = below(0x110000);
      return any >= 0xD800 && any < 0xE000 ? 0xFFFD : any;
    }
    default:
      return U'a' + below(26);
  }
}

inline std::string random_text(std::mt19937_64& random, std::size_t n_code_points) {
  std::string text;
  for (std::size_t i = 0; i < n_code_points; ++i) append_utf8(text, random_code_point(random));
  return text;
}

}  // namespace spindle::text
