#include "cluster/text/jinja/lexer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <utility>

#include "cluster/text/jinja/python_strings.h"
#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
         static_cast<unsigned char>(c) >= 0x80;
}
bool is_name_character(char c) { return is_name_start(c) || is_digit(c); }

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {}

  Result<std::vector<Token>> run() {
    while (at_ < source_.size() && status_.ok()) lex_root();
    if (!status_.ok()) return status_;
    add(TokenKind::kEnd, at_);
    return std::move(tokens_);
  }

 private:
  void fail(std::size_t where, const std::string& message) {
    if (!status_.ok()) return;
    status_ =
        invalid_argument(describe_position(source_, static_cast<Position>(where)) + ": " + message);
  }
  bool looking_at(std::string_view text) const { return source_.substr(at_).starts_with(text); }
  Token& add(TokenKind kind, std::size_t where, std::string_view text = {}) {
    tokens_.push_back(
        {.kind = kind, .position = static_cast<Position>(where), .text = std::string(text)});
    return tokens_.back();
  }

  // ---- text outside of tags ----

  void lex_root() {
    std::size_t begin = at_;
    while (begin < source_.size() && !(source_[begin] == '{' && begin + 1 < source_.size() &&
                                       (source_[begin + 1] == '{' || source_[begin + 1] == '%' ||
                                        source_[begin + 1] == '#'))) {
      ++begin;
    }
    const std::string_view data = source_.substr(at_, begin - at_);
    if (begin >= source_.size()) {
      add_data(data);
      at_ = begin;
      return;
    }
    const std::size_t data_begin = at_;
    const char kind = source_[begin + 1];
    at_ = begin + 2;
    const char sign = take_sign();
    add_data(strip_before_tag(data, sign, kind != '{'), data_begin);
    if (kind == '#') {
      skip_comment(begin);
    } else if (kind == '{') {
      add(TokenKind::kVariableBegin, begin);
      lex_expression(begin, "}}", TokenKind::kVariableEnd);
    } else if (!lex_raw(begin)) {
      add(TokenKind::kBlockBegin, begin);
      lex_expression(begin, "%}", TokenKind::kBlockEnd);
    }
  }

  void add_data(std::string_view data, std::size_t where) {
    if (!data.empty()) add(TokenKind::kData, where, data);
  }
  void add_data(std::string_view data) { add_data(data, at_); }

  char take_sign() {
    if (!looking_at("-") && !looking_at("+")) return ' ';
    return source_[at_++];
  }

  // "-" strips all white space before a tag; otherwise a block that is the first thing on its line
  // takes the line's indentation with it.
  std::string_view strip_before_tag(std::string_view data, char sign, bool is_block) const {
    if (sign == '-') return strip_right(data);
    if (sign == '+' || !is_block) return data;
    const std::size_t newline = data.rfind('\n');
    if (newline == std::string_view::npos && !at_line_start_) return data;
    const std::size_t line = newline == std::string_view::npos ? 0 : newline + 1;
    return strip_left(data.substr(line)).empty() ? data.substr(0, line) : data;
  }

  // Moves past the end of a tag of which `end` was found, with the white space it controls.
  void finish_tag(char sign, std::size_t end_bytes, bool trims_newline) {
    at_ += end_bytes;
    at_line_start_ = false;
    if (sign == '-') {
      const std::string_view rest = source_.substr(at_);
      const std::size_t n_space = rest.size() - strip_left(rest).size();
      at_ += n_space;
      at_line_start_ = n_space > 0 && source_[at_ - 1] == '\n';
    } else if (sign != '+' && trims_newline && looking_at("\n")) {
      ++at_;
      at_line_start_ = true;
    }
  }

  void skip_comment(std::size_t begin) {
    const std::size_t end = source_.find("#}", at_);
    if (end == std::string_view::npos) return fail(begin, "the comment is not closed");
    const char sign = end > at_ ? source_[end - 1] : ' ';
    at_ = end;
    finish_tag(sign == '-' || sign == '+' ? sign : ' ', 2, true);
  }

  // "{% raw %}" to "{% endraw %}"; false (and nothing moved) if this block is something else.
  bool lex_raw(std::size_t begin) {
    const auto open_end = match_keyword_tag(at_, "raw");
    if (!open_end) return false;
    at_ = open_end->second;
    finish_tag(open_end->first, 2, false);
    const std::size_t data_begin = at_;
    std::size_t tag = at_;
    while ((tag = source_.find("{%", tag)) != std::string_view::npos) {
      at_ = tag + 2;
      const char sign = take_sign();
      if (const auto close = match_keyword_tag(at_, "endraw")) {
        const std::string_view data = source_.substr(data_begin, tag - data_begin);
        add_data(strip_before_tag(data, sign, true), data_begin);
        at_ = close->second;
        finish_tag(close->first, 2, true);
        return true;
      }
      tag += 2;
    }
    fail(begin, "raw without endraw");
    return true;
  }

  // If only `keyword` stands between `from` and "%}": the sign before "%}", and where "%}" is.
  std::optional<std::pair<char, std::size_t>> match_keyword_tag(std::size_t from,
                                                                std::string_view keyword) const {
    std::string_view rest = strip_left(source_.substr(from));
    if (!rest.starts_with(keyword)) return std::nullopt;
    rest = strip_left(rest.substr(keyword.size()));
    const bool has_sign = rest.starts_with('-') || rest.starts_with('+');
    const char sign = has_sign ? rest.front() : ' ';
    if (has_sign) rest.remove_prefix(1);
    if (!rest.starts_with("%}")) return std::nullopt;
    return std::pair(sign, source_.size() - rest.size());
  }

  // ---- inside of tags ----

  void lex_expression(std::size_t begin, std::string_view end, TokenKind end_kind) {
    std::vector<char> brackets;
    while (status_.ok()) {
      const std::string_view rest = source_.substr(at_);
      at_ += rest.size() - strip_left(rest).size();
      if (at_ >= source_.size()) return fail(begin, "the tag is not closed");
      if (brackets.empty() && take_tag_end(end, end_kind)) return;
      lex_token(brackets);
    }
  }

  bool take_tag_end(std::string_view end, TokenKind end_kind) {
    const std::size_t where = at_;
    char sign = ' ';
    if (looking_at("-") || (looking_at("+") && end_kind == TokenKind::kBlockEnd)) {
      if (!source_.substr(at_ + 1).starts_with(end)) return false;
      sign = source_[at_++];
    } else if (!looking_at(end)) {
      return false;
    }
    add(end_kind, where);
    finish_tag(sign, end.size(), end_kind == TokenKind::kBlockEnd);
    return true;
  }

  void lex_token(std::vector<char>& brackets) {
    const char c = source_[at_];
    if (is_digit(c)) return lex_number();
    if (c == '"' || c == '\'') return lex_string();
    if (!is_name_start(c)) return lex_operator(brackets);
    const std::size_t begin = at_;
    while (at_ < source_.size() && is_name_character(source_[at_])) ++at_;
    add(TokenKind::kName, begin, source_.substr(begin, at_ - begin));
  }

  void lex_operator(std::vector<char>& brackets) {
    constexpr std::array<std::string_view, 26> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};
    for (const std::string_view op : kOperators) {
      if (!looking_at(op)) continue;
      const char c = op.front();
      if (c == '(' || c == '[' || c == '{') {
        brackets.push_back(c == '(' ? ')' : c == '[' ? ']' : '}');
      } else if (c == ')' || c == ']' || c == '}') {
        if (brackets.empty() || brackets.back() != c) {
          return fail(at_, std::string("unexpected '") + c + "'");
        }
        brackets.pop_back();
      }
      add(TokenKind::kOperator, at_, op);
      at_ += op.size();
      return;
    }
    fail(at_, "unexpected character '" + std::string(source_.substr(at_, 1)) + "'");
  }

  std::string take_digits() {
    std::string digits;
    while (at_ < source_.size() &&
           (is_digit(source_[at_]) ||
            (source_[at_] == '_' && at_ + 1 < source_.size() && is_digit(source_[at_ + 1])))) {
      if (source_[at_] != '_') digits += source_[at_];
      ++at_;
    }
    return digits;
  }

  void lex_number() {
    const std::size_t begin = at_;
    if (lex_prefixed_integer()) return;
    // "x.0.5" is two subscripts, so a number after a dot has no fraction.
    const bool after_dot = !tokens_.empty() && tokens_.back().is_operator(".");
    std::string digits = take_digits();
    bool is_float = false;
    if (!after_dot) {
      if (looking_at(".") && at_ + 1 < source_.size() && is_digit(source_[at_ + 1])) {
        ++at_;
        digits += '.' + take_digits();
        is_float = true;
      }
      std::size_t exponent = at_ + 1;
      if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) {
        ++exponent;
      }
      if ((looking_at("e") || looking_at("E")) && exponent < source_.size() &&
          is_digit(source_[exponent])) {
        digits += 'e' + std::string(source_.substr(at_ + 1, exponent - at_ - 1));
        at_ = exponent;
        digits += take_digits();
        is_float = true;
      }
    }
    Token& token = add(is_float ? TokenKind::kFloat : TokenKind::kInteger, begin);
    if (is_float) {
      token.real = python_parse_float(digits).value_or(0.0);
      return;
    }
    const auto parsed =
        std::from_chars(digits.data(), digits.data() + digits.size(), token.integer);
    if (parsed.ec != std::errc()) fail(begin, "the integer does not fit 64 bits");
  }

  bool lex_prefixed_integer() {
    if (source_[at_] != '0' || at_ + 2 >= source_.size()) return false;
    const char kind = static_cast<char>(source_[at_ + 1] | 0x20);
    const int base = kind == 'x' ? 16 : kind == 'o' ? 8 : kind == 'b' ? 2 : 0;
    if (base == 0) return false;
    const std::size_t begin = at_;
    std::int64_t integer = 0;
    const auto parsed =
        std::from_chars(source_.data() + at_ + 2, source_.data() + source_.size(), integer, base);
    if (parsed.ec != std::errc()) {
      fail(begin, "malformed integer");
      return true;
    }
    at_ = static_cast<std::size_t>(parsed.ptr - source_.data());
    add(TokenKind::kInteger, begin).integer = integer;
    return true;
  }

  // ---- strings ----

  void lex_string() {
    const std::size_t begin = at_;
    const char quote = source_[at_++];
    std::string value;
    while (at_ < source_.size() && source_[at_] != quote && status_.ok()) {
      if (source_[at_] == '\\') {
        lex_escape(value);
      } else {
        value += source_[at_++];
      }
    }
    if (at_ >= source_.size()) return fail(begin, "the string is not closed");
    ++at_;
    add(TokenKind::kString, begin).text = std::move(value);
  }

  void lex_escape(std::string& value) {
    if (at_ + 1 >= source_.size()) {
      ++at_;
      return;
    }
    constexpr std::string_view kNames = "\\'\"abfnrtv";
    constexpr std::string_view kMeanings = "\\'\"\a\b\f\n\r\t\v";
    const char c = source_[at_ + 1];
    const std::size_t simple = kNames.find(c);
    if (simple != std::string_view::npos) {
      value += kMeanings[simple];
      at_ += 2;
    } else if (c == '\n') {
      at_ += 2;  // a continued line
    } else if (c == 'x' || c == 'u' || c == 'U') {
      lex_code_point(value, 2, c == 'x' ? 2 : c == 'u' ? 4 : 8, 16);
    } else if (c >= '0' && c <= '7') {
      std::size_t n_digits = 1;
      while (n_digits < 3 && at_ + 1 + n_digits < source_.size() &&
             source_[at_ + 1 + n_digits] >= '0' && source_[at_ + 1 + n_digits] <= '7') {
        ++n_digits;
      }
      lex_code_point(value, 1, n_digits, 8);
    } else if (c == 'N') {
      fail(at_, "named characters are not supported");
    } else {
      value += '\\';  // an unknown escape stands for itself
      ++at_;
    }
  }

  void lex_code_point(std::string& value, std::size_t skip, std::size_t n_digits, int base) {
    const std::string_view digits = source_.substr(std::min(at_ + skip, source_.size()), n_digits);
    std::uint32_t code_point = 0;
    const auto parsed =
        std::from_chars(digits.data(), digits.data() + digits.size(), code_point, base);
    if (digits.size() != n_digits || parsed.ptr != digits.data() + n_digits ||
        code_point > 0x10FFFF || (code_point >= 0xD800 && code_point < 0xE000)) {
      return fail(at_, "malformed escape");
    }
    append_utf8(value, code_point);
    at_ += skip + n_digits;
  }

  std::string_view source_;
  std::size_t at_ = 0;
  bool at_line_start_ = true;
  std::vector<Token> tokens_;
  Status status_;
};

}  // namespace

std::string describe_position(std::string_view source, Position position) {
  const std::string_view before = source.substr(0, position);
  const auto line = std::count(before.begin(), before.end(), '\n') + 1;
  const std::size_t line_start =
      before.rfind('\n') == std::string_view::npos ? 0 : before.rfind('\n') + 1;
  return "line " + std::to_string(line) + ", column " +
         std::to_string(count_code_points(before.substr(line_start)) + 1);
}

std::string normalize_source(std::string_view source) {
  std::string normalized;
  normalized.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      normalized += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      normalized += source[i];
    }
  }
  if (normalized.ends_with('\n')) normalized.pop_back();
  return normalized;
}

Result<std::vector<Token>> tokenize(std::string_view source) { return Lexer(source).run(); }

}  // namespace spindle::text::jinja
