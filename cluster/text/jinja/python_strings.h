#pragma once
// String operations with the meaning they have for Python's str. All texts are valid UTF-8, all
// lengths and indices are in code points unless their name says bytes.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace spindle::text::jinja {

// str.strip and its halves: of Python's white space, or of the characters in `characters`.
std::string_view strip_left(std::string_view text,
                            std::optional<std::string_view> characters = std::nullopt);
std::string_view strip_right(std::string_view text,
                             std::optional<std::string_view> characters = std::nullopt);

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
// str.title: the first letter of every run of letters is upper case.
std::string to_title(std::string_view text);
// str.capitalize
std::string capitalize(std::string_view text);

// str.split and str.rsplit. max_splits < 0 is unlimited; a given separator is not empty.
std::vector<std::string_view> split(std::string_view text,
                                    std::optional<std::string_view> separator,
                                    std::int64_t max_splits);
std::vector<std::string_view> split_from_right(std::string_view text,
                                               std::optional<std::string_view> separator,
                                               std::int64_t max_splits);
std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends);
// An upper bound of how many lines split_lines gives.
std::size_t max_lines(std::string_view text);

// Byte offset of `wanted` at or after `from_bytes`, in linear time; npos if there is none.
std::size_t find_bytes(std::string_view text, std::string_view wanted, std::size_t from_bytes = 0);
// Non-overlapping occurrences; between all characters and at the ends for an empty `wanted`.
std::int64_t count_occurrences(std::string_view text, std::string_view wanted);
// max_count < 0 is unlimited.
std::string replace(std::string_view text, std::string_view old_text, std::string_view new_text,
                    std::int64_t max_count);

// The bytes of the code points [begin, end), which must lie within the text.
std::string_view code_point_range(std::string_view text, std::size_t begin, std::size_t end);

enum class CharacterClass { kAlphabetic, kDecimal, kDigit, kNumeric, kAlphanumeric, kSpace };
// str.isalpha and its kin: not empty and all characters are of that class.
bool all_of_class(std::string_view text, CharacterClass wanted);
// str.isupper and str.islower: has cased characters, and all of them are of that case.
bool is_upper(std::string_view text);
bool is_lower(std::string_view text);

// float(text), as Python reads it; nothing if it is no number.
std::optional<double> python_parse_float(std::string_view text);
// int(text, base); nothing if it is no integer or does not fit 64 bits.
std::optional<std::int64_t> python_parse_integer(std::string_view text, int base);

}  // namespace spindle::text::jinja
