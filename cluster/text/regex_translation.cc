#include "cluster/text/regex_translation.h"

#include <optional>
#include <vector>

namespace spindle::text {
namespace {

// The insides of a character class. Outside of classes Oniguruma counts the Latin-1 superscripts
// and fractions as word characters, inside it does not.
constexpr std::string_view kWordInside = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
constexpr std::string_view kWordOutside =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kSpaceInside = R"(\p{White_Space})";

class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  Result<std::string> run() {
    if (pattern_.starts_with("(?i)")) {  // at the start both dialects mean the whole pattern
      out_ = "(?i)";
      at_ = 4;
    }
    while (at_ < pattern_.size()) {
      const Status status = translate_one();
      if (!status.ok()) return status;
    }
    return std::move(out_);
  }

 private:
  Status refuse(std::string_view what) const {
    return unimplemented("regular expression: " + std::string(what) + " at byte " +
                         std::to_string(at_) + " is not supported");
  }
  bool looking_at(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  void copy(std::size_t n_bytes) {
    out_.append(pattern_, at_, n_bytes);
    at_ += n_bytes;
  }
  void begin_atom() { atom_ = out_.size(); }

  Status translate_one() {
    switch (pattern_[at_]) {
      case '\\':
        begin_atom();
        return translate_escape();
      case '[':
        begin_atom();
        return translate_class();
      case '(':
        return open_group();
      case ')':
        if (!groups_.empty()) {
          atom_ = groups_.back();
          groups_.pop_back();
        }
        copy(1);
        return {};
      case '{':
        return translate_interval();
      case '|':
        atom_.reset();
        copy(1);
        return {};
      case '*':
      case '+':
      case '?':
        copy(1);
        return {};
      default: {
        begin_atom();
        copy(1);
        // All bytes of one character belong to the atom.
        while (at_ < pattern_.size() &&
               (static_cast<unsigned char>(pattern_[at_]) & 0xC0u) == 0x80u) {
          copy(1);
        }
        return {};
      }
    }
  }

  Status open_group() {
    if (looking_at("(*")) return refuse("a quantifier without an operand");
    groups_.push_back(out_.size());
    atom_.reset();
    if (!looking_at("(?")) {
      copy(1);
      return {};
    }
    for (const std::string_view opening : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i:"}) {
      if (looking_at(opening)) {
        copy(opening.size());
        return {};
      }
    }
    return refuse("the group " + std::string(pattern_.substr(at_, 4)));
  }

  // "{n,m}" is an interval, and "{n,m}+" repeats it; any other "{" is a literal brace.
  Status translate_interval() {
    const std::size_t end = interval_end();
    if (end == 0) {
      begin_atom();
      out_ += "\\{";
      ++at_;
      return {};
    }
    const std::string_view interval = pattern_.substr(at_, end - at_);
    if (interval[1] == ',') return refuse("an interval without a lower bound");
    if (!atom_) return refuse("an interval without an operand");
    const bool is_exact = interval.find(',') == std::string_view::npos;
    copy(interval.size());
    if (is_exact && looking_at("?")) return refuse("an optional interval");
    if (at_ < pattern_.size() && pattern_[at_] == '+') {
      out_.insert(*atom_, "(?:");
      out_ += ")+";
      ++at_;
    }
    return {};
  }

  std::size_t interval_end() const {
    std::size_t end = at_ + 1;
    bool has_digit = false;
    bool has_comma = false;
    for (; end < pattern_.size() && pattern_[end] != '}'; ++end) {
      const char c = pattern_[end];
      if (c == ',' && !has_comma) {
        has_comma = true;
      } else if (c >= '0' && c <= '9') {
        has_digit = true;
      } else {
        return 0;
      }
    }
    return end < pattern_.size() && has_digit ? end + 1 : 0;
  }

  Status translate_escape() {
    if (at_ + 1 >= pattern_.size()) return refuse("a backslash at the end");
    const std::string word(kWordOutside);
    switch (pattern_[at_ + 1]) {
      case 's':
        return replace(2, "[" + std::string(kSpaceInside) + "]");
      case 'S':
        return replace(2, "[^" + std::string(kSpaceInside) + "]");
      case 'w':
        return replace(2, "[" + word + "]");
      case 'W':
        return replace(2, "[^" + word + "]");
      case 'b':
        return replace(
            2, "(?:(?<=[" + word + "])(?![" + word + "])|(?<![" + word + "])(?=[" + word + "]))");
      case 'B':
        return replace(
            2, "(?:(?<=[" + word + "])(?=[" + word + "])|(?<![" + word + "])(?![" + word + "]))");
      case 'A':
      case 'z':
      case 'Z':
        copy(2);
        return {};
      default:
        return translate_common_escape();
    }
  }

  // Escapes that read the same inside and outside of a class.
  Status translate_common_escape() {
    const char kind = pattern_[at_ + 1];
    switch (kind) {
      case 'd':
      case 'D':
      case 'r':
      case 'n':
      case 't':
      case 'f':
        copy(2);
        return {};
      case 'v':
        return replace(2, "\\x0b");
      case 'p':
      case 'P':
        return translate_property();
      case 'x':
        return translate_hexadecimal();
      case 'u':
        return translate_unicode();
      default:
        break;
    }
    const bool is_alphanumeric = (kind >= '0' && kind <= '9') || (kind >= 'a' && kind <= 'z') ||
                                 (kind >= 'A' && kind <= 'Z');
    if (is_alphanumeric) return refuse(std::string("the escape \\") + kind);
    out_ += '\\';
    ++at_;
    copy(1);
    return {};
  }

  Status translate_property() {
    const std::size_t close = pattern_.find('}', at_);
    if (at_ + 2 >= pattern_.size() || pattern_[at_ + 2] != '{' || close == std::string_view::npos) {
      return refuse("a property without braces");
    }
    copy(close + 1 - at_);
    return {};
  }

  static bool is_hexadecimal(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
  }

  Status translate_hexadecimal() {
    std::size_t end = at_ + 2;
    if (end < pattern_.size() && pattern_[end] == '{') {
      const std::size_t close = pattern_.find('}', end);
      if (close == std::string_view::npos) return refuse("an unclosed \\x{");
      for (std::size_t i = end + 1; i < close; ++i) {
        if (!is_hexadecimal(pattern_[i])) return refuse("the escape \\x{");
      }
      copy(close + 1 - at_);
      return {};
    }
    while (end < pattern_.size() && end < at_ + 4 && is_hexadecimal(pattern_[end])) ++end;
    // Above 0x7f Oniguruma reads a raw byte, PCRE2 a code point.
    if (end != at_ + 4 || pattern_[at_ + 2] > '7') return refuse("this \\x escape");
    copy(4);
    return {};
  }

  Status translate_unicode() {
    for (std::size_t i = at_ + 2; i < at_ + 6; ++i) {
      if (i >= pattern_.size() || !is_hexadecimal(pattern_[i])) return refuse("this \\u escape");
    }
    return replace(6, "\\x{" + std::string(pattern_.substr(at_ + 2, 4)) + "}");
  }

  Status translate_class() {
    copy(1);
    if (looking_at("^")) copy(1);
    if (looking_at("]")) return refuse("a class that begins with ]");
    while (at_ < pattern_.size() && pattern_[at_] != ']') {
      if (looking_at("[")) return refuse("a class inside a class");
      if (looking_at("&&")) return refuse("a class intersection");
      if (pattern_[at_] != '\\') {
        copy(1);
        continue;
      }
      const Status status = translate_class_escape();
      if (!status.ok()) return status;
    }
    if (at_ >= pattern_.size()) return refuse("an unclosed class");
    copy(1);
    return {};
  }

  Status translate_class_escape() {
    if (at_ + 1 >= pattern_.size()) return refuse("a backslash at the end");
    switch (pattern_[at_ + 1]) {
      case 's':
        return replace(2, kSpaceInside);
      case 'S':
        return replace(2, R"(\P{White_Space})");
      case 'w':
        return replace(2, kWordInside);
      case 'b':
        return replace(2, "\\x08");
      default:
        return translate_common_escape();
    }
  }

  Status replace(std::size_t n_bytes, std::string_view with) {
    out_ += with;
    at_ += n_bytes;
    return {};
  }

  std::string_view pattern_;
  std::size_t at_ = 0;
  std::string out_;
  std::optional<std::size_t> atom_;  // where in out_ the operand of a following quantifier begins
  std::vector<std::size_t> groups_;  // where in out_ each open group begins
};

}  // namespace

Result<std::string> translate_regex(std::string_view pattern) { return Translator(pattern).run(); }

std::string escape_regex(std::string_view literal) {
  std::string escaped;
  for (const char c : literal) {
    const bool is_plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                          (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80;
    if (c == '\0') {
      escaped += "\\x00";
    } else {
      if (!is_plain) escaped += '\\';
      escaped += c;
    }
  }
  return escaped;
}

}  // namespace spindle::text
