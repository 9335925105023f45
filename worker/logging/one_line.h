#pragma once
// Text of any bytes as one line of a log.

#include <cstddef>
#include <string>
#include <string_view>

namespace spindle::worker {

// Valid UTF-8 without anything that ends a line, moves a cursor or reverses the writing: control
// characters become \n, \t, \xNN, other such characters \uNNNN, bytes that are not UTF-8 \xNN.
std::string one_line(std::string_view bytes);

// The first max_bytes bytes at most, never cut inside a character of valid UTF-8; "..." follows
// when there was more.
std::string cut_text(std::string_view text, std::size_t max_bytes);

}  // namespace spindle::worker
