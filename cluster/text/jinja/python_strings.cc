#include "cluster/text/jinja/python_strings.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <limits>

#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

bool is_stripped(char32_t c, std::optional<std::string_view> characters) {
  if (!characters) return is_python_white_space(c);
  for (std::size_t offset = 0; offset < characters->size();) {
    if (next_code_point(*characters, offset) == c) return true;
  }
  return false;
}

std::size_t last_character_begin(std::string_view text) {
  std::size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0u) == 0x80u) --begin;
  return begin;
}

utf8proc_category_t category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

bool is_cased(char32_t c) {
  const auto kind = category(c);
  return kind == UTF8PROC_CATEGORY_LU || kind == UTF8PROC_CATEGORY_LL ||
         kind == UTF8PROC_CATEGORY_LT;
}

// utf8proc maps single characters; the sharp s is the one common letter that becomes two.
void append_upper(std::string& out, char32_t c) {
  if (c == 0xDF) {
    out += "SS";
  } else {
    append_utf8(out, static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c))));
  }
}
void append_title(std::string& out, char32_t c) {
  if (c == 0xDF) {
    out += "Ss";
  } else {
    append_utf8(out, static_cast<char32_t>(utf8proc_totitle(static_cast<utf8proc_int32_t>(c))));
  }
}
void append_lower(std::string& out, char32_t c) {
  append_utf8(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
}

bool is_line_end(char32_t c) {
  return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
         c == 0x2029;
}

bool is_of_class(char32_t c, CharacterClass wanted) {
  const auto kind = category(c);
  const bool is_letter = kind == UTF8PROC_CATEGORY_LU || kind == UTF8PROC_CATEGORY_LL ||
                         kind == UTF8PROC_CATEGORY_LT || kind == UTF8PROC_CATEGORY_LM ||
                         kind == UTF8PROC_CATEGORY_LO;
  const bool is_number =
      kind == UTF8PROC_CATEGORY_ND || kind == UTF8PROC_CATEGORY_NL || kind == UTF8PROC_CATEGORY_NO;
  switch (wanted) {
    case CharacterClass::kAlphabetic:
      return is_letter;
    case CharacterClass::kDecimal:
      return kind == UTF8PROC_CATEGORY_ND;
    case CharacterClass::kDigit:  // also superscripts and subscripts
      return kind == UTF8PROC_CATEGORY_ND || c == 0xB2 || c == 0xB3 || c == 0xB9 || c == 0x2070 ||
             (c >= 0x2074 && c <= 0x2079) || (c >= 0x2080 && c <= 0x2089);
    case CharacterClass::kNumeric:
      return is_number;
    case CharacterClass::kAlphanumeric:
      return is_letter || is_number;
    case CharacterClass::kSpace:
      return is_python_white_space(c);
  }
  return false;
}

// Digits with the single underscores that Python allows between them removed; nothing if they
// stand anywhere else.
std::optional<std::string> remove_underscores(std::string_view text) {
  const auto is_alphanumeric = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  };
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      plain += text[i];
    } else if (i == 0 || i + 1 >= text.size() || !is_alphanumeric(text[i - 1]) ||
               !is_alphanumeric(text[i + 1])) {
      return std::nullopt;
    }
  }
  return plain;
}

}  // namespace

std::string_view strip_left(std::string_view text, std::optional<std::string_view> characters) {
  while (!text.empty()) {
    std::size_t after = 0;
    if (!is_stripped(next_code_point(text, after), characters)) break;
    text.remove_prefix(after);
  }
  return text;
}

std::string_view strip_right(std::string_view text, std::optional<std::string_view> characters) {
  while (!text.empty() && is_stripped(last_code_point(text), characters)) {
    text = text.substr(0, last_character_begin(text));
  }
  return text;
}

std::string to_upper(std::string_view text) {
  std::string out;
  for (std::size_t offset = 0; offset < text.size();) {
    append_upper(out, next_code_point(text, offset));
  }
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  for (std::size_t offset = 0; offset < text.size();) {
    append_lower(out, next_code_point(text, offset));
  }
  return out;
}

std::string to_title(std::string_view text) {
  std::string out;
  bool after_cased = false;
  for (std::size_t offset = 0; offset < text.size();) {
    const char32_t c = next_code_point(text, offset);
    if (after_cased) {
      append_lower(out, c);
    } else {
      append_title(out, c);
    }
    after_cased = is_cased(c);
  }
  return out;
}

std::string capitalize(std::string_view text) {
  std::string out;
  if (text.empty()) return out;
  std::size_t offset = 0;
  append_title(out, next_code_point(text, offset));
  return out + to_lower(text.substr(offset));
}

std::vector<std::string_view> split(std::string_view text,
                                    std::optional<std::string_view> separator,
                                    std::int64_t max_splits) {
  std::vector<std::string_view> parts;
  const auto limit = max_splits < 0 ? std::numeric_limits<std::size_t>::max()
                                    : static_cast<std::size_t>(max_splits);
  if (separator) {
    std::size_t begin = 0;
    while (parts.size() < limit) {
      const std::size_t at = find_bytes(text, *separator, begin);
      if (at == std::string_view::npos) break;
      parts.push_back(text.substr(begin, at - begin));
      begin = at + separator->size();
    }
    parts.push_back(text.substr(begin));
    return parts;
  }
  text = strip_left(text);
  while (!text.empty()) {
    if (parts.size() == limit) {
      parts.push_back(text);  // the rest keeps its trailing white space
      break;
    }
    std::size_t end = 0;
    while (end < text.size()) {
      std::size_t after = end;
      if (is_python_white_space(next_code_point(text, after))) break;
      end = after;
    }
    parts.push_back(text.substr(0, end));
    text = strip_left(text.substr(end));
  }
  return parts;
}

std::vector<std::string_view> split_from_right(std::string_view text,
                                               std::optional<std::string_view> separator,
                                               std::int64_t max_splits) {
  std::vector<std::string_view> parts;
  const auto limit = max_splits < 0 ? std::numeric_limits<std::size_t>::max()
                                    : static_cast<std::size_t>(max_splits);
  if (separator) {
    while (parts.size() < limit) {
      const std::size_t at = text.rfind(*separator);
      if (at == std::string_view::npos) break;
      parts.push_back(text.substr(at + separator->size()));
      text = text.substr(0, at);
    }
    parts.push_back(text);
  } else {
    text = strip_right(text);
    while (!text.empty()) {
      if (parts.size() == limit) {
        parts.push_back(text);
        break;
      }
      std::size_t begin = text.size();
      while (begin > 0 && !is_python_white_space(last_code_point(text.substr(0, begin)))) {
        begin = last_character_begin(text.substr(0, begin));
      }
      parts.push_back(text.substr(begin));
      text = strip_right(text.substr(0, begin));
    }
  }
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  std::size_t begin = 0;
  for (std::size_t offset = 0; offset < text.size();) {
    const std::size_t end = offset;
    const char32_t c = next_code_point(text, offset);
    if (!is_line_end(c)) continue;
    if (c == '\r' && offset < text.size() && text[offset] == '\n') ++offset;
    lines.push_back(text.substr(begin, (keep_ends ? offset : end) - begin));
    begin = offset;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

// Last bytes of all line ends; a few other characters share them.
constexpr std::string_view kLineEndBytes = "\n\v\f\r\x1C\x1D\x1E\x85\xA8\xA9";

std::size_t max_lines(std::string_view text) {
  const auto n = std::count_if(text.begin(), text.end(), [](char c) {
    return kLineEndBytes.find(c) != std::string_view::npos;
  });
  return static_cast<std::size_t>(n) + 1;
}

std::size_t find_bytes(std::string_view text, std::string_view wanted, std::size_t from_bytes) {
  if (from_bytes > text.size()) return std::string_view::npos;
  if (wanted.empty()) return from_bytes;
  // memmem is linear for every pattern; windows keep a call's cost near what it finds even where
  // memmem looks at all its input first (as the address sanitizer's does).
  const std::size_t window_bytes = std::max<std::size_t>(4096, 4 * wanted.size());
  for (std::size_t at = from_bytes; text.size() - at >= wanted.size();
       at += window_bytes - wanted.size() + 1) {
    const std::string_view window = text.substr(at, window_bytes);
    const void* found = memmem(window.data(), window.size(), wanted.data(), wanted.size());
    if (found != nullptr) {
      return static_cast<std::size_t>(static_cast<const char*>(found) - text.data());
    }
    if (window.size() < window_bytes) break;
  }
  return std::string_view::npos;
}

std::int64_t count_occurrences(std::string_view text, std::string_view wanted) {
  if (wanted.empty()) return static_cast<std::int64_t>(count_code_points(text)) + 1;
  std::int64_t n = 0;
  for (std::size_t at = find_bytes(text, wanted); at != std::string_view::npos;
       at = find_bytes(text, wanted, at + wanted.size())) {
    ++n;
  }
  return n;
}

std::string replace(std::string_view text, std::string_view old_text, std::string_view new_text,
                    std::int64_t max_count) {
  const auto limit = max_count < 0 ? std::numeric_limits<std::int64_t>::max() : max_count;
  std::string out;
  std::int64_t n = 0;
  if (old_text.empty()) {  // before every character and at the end
    for (std::size_t offset = 0; offset < text.size();) {
      if (n++ < limit) out += new_text;
      const std::size_t begin = offset;
      next_code_point(text, offset);
      out += text.substr(begin, offset - begin);
    }
    if (n < limit) out += new_text;
    return out;
  }
  std::size_t begin = 0;
  for (; n < limit; ++n) {
    const std::size_t at = find_bytes(text, old_text, begin);
    if (at == std::string_view::npos) break;
    out.append(text, begin, at - begin).append(new_text);
    begin = at + old_text.size();
  }
  return out.append(text, begin);
}

std::string_view code_point_range(std::string_view text, std::size_t begin, std::size_t end) {
  std::size_t offset = 0;
  for (std::size_t i = 0; i < begin; ++i) {
    offset += utf8_sequence_bytes(static_cast<unsigned char>(text[offset]));
  }
  const std::size_t begin_bytes = offset;
  for (std::size_t i = begin; i < end; ++i) {
    offset += utf8_sequence_bytes(static_cast<unsigned char>(text[offset]));
  }
  return text.substr(begin_bytes, offset - begin_bytes);
}

bool all_of_class(std::string_view text, CharacterClass wanted) {
  for (std::size_t offset = 0; offset < text.size();) {
    if (!is_of_class(next_code_point(text, offset), wanted)) return false;
  }
  return !text.empty();
}

bool is_upper(std::string_view text) {
  bool has_upper = false;
  for (std::size_t offset = 0; offset < text.size();) {
    const auto kind = category(next_code_point(text, offset));
    if (kind == UTF8PROC_CATEGORY_LL || kind == UTF8PROC_CATEGORY_LT) return false;
    has_upper = has_upper || kind == UTF8PROC_CATEGORY_LU;
  }
  return has_upper;
}

bool is_lower(std::string_view text) {
  bool has_lower = false;
  for (std::size_t offset = 0; offset < text.size();) {
    const auto kind = category(next_code_point(text, offset));
    if (kind == UTF8PROC_CATEGORY_LU || kind == UTF8PROC_CATEGORY_LT) return false;
    has_lower = has_lower || kind == UTF8PROC_CATEGORY_LL;
  }
  return has_lower;
}

std::optional<double> python_parse_float(std::string_view text) {
  const auto plain = remove_underscores(strip_right(strip_left(text)));
  if (!plain || plain->empty()) return std::nullopt;
  std::string_view digits = *plain;
  bool negative = false;
  if (digits.front() == '+' || digits.front() == '-') {
    negative = digits.front() == '-';
    digits.remove_prefix(1);
  }
  if (digits.empty() || digits.front() == '+' || digits.front() == '-') return std::nullopt;
  std::string lower(digits);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c; });
  double value = 0;
  if (lower == "inf" || lower == "infinity") {
    value = std::numeric_limits<double>::infinity();
  } else if (lower == "nan") {
    value = std::numeric_limits<double>::quiet_NaN();
  } else {
    if (lower.find_first_not_of("0123456789.e+-") != std::string::npos) return std::nullopt;
    const auto parsed = std::from_chars(lower.data(), lower.data() + lower.size(), value);
    if (parsed.ptr != lower.data() + lower.size()) return std::nullopt;
    if (parsed.ec == std::errc::result_out_of_range) {
      // Either end of the range: the sign of the exponent says which.
      const bool is_small = lower.find("e-") != std::string::npos;
      value = is_small ? 0.0 : std::numeric_limits<double>::infinity();
    } else if (parsed.ec != std::errc()) {
      return std::nullopt;
    }
  }
  return negative ? -value : value;
}

std::optional<std::int64_t> python_parse_integer(std::string_view text, int base) {
  const auto plain = remove_underscores(strip_right(strip_left(text)));
  if (!plain) return std::nullopt;
  std::string_view digits = *plain;
  bool negative = false;
  if (!digits.empty() && (digits.front() == '+' || digits.front() == '-')) {
    negative = digits.front() == '-';
    digits.remove_prefix(1);
  }
  if (digits.size() > 2 && digits[0] == '0') {
    const char kind = static_cast<char>(digits[1] | 0x20);
    const int prefix_base = kind == 'x' ? 16 : kind == 'o' ? 8 : kind == 'b' ? 2 : -1;
    if (prefix_base > 0 && (base == prefix_base || base == 0)) {
      digits.remove_prefix(2);
      base = prefix_base;
    }
  }
  if (base == 0) base = 10;
  if (base < 2 || base > 36 || digits.empty() || digits.front() == '-') return std::nullopt;
  const std::string signed_digits = (negative ? "-" : "") + std::string(digits);
  std::int64_t value = 0;
  const auto parsed = std::from_chars(signed_digits.data(),
                                      signed_digits.data() + signed_digits.size(), value, base);
  if (parsed.ec != std::errc() || parsed.ptr != signed_digits.data() + signed_digits.size()) {
    return std::nullopt;
  }
  return value;
}

}  // namespace spindle::text::jinja
