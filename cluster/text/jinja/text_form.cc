#include "cluster/text/jinja/text_form.h"

#include <utf8proc.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

bool is_printable(char32_t c) {
  if (c == U' ') return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
      return false;
    default:
      return true;
  }
}

void append_hexadecimal(std::string& out, char32_t c) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  const int n_digits = c <= 0xFF ? 2 : c <= 0xFFFF ? 4 : 8;
  out += n_digits == 2 ? "\\x" : n_digits == 4 ? "\\u" : "\\U";
  for (int i = n_digits - 1; i >= 0; --i) out += kDigits[(c >> (4 * i)) & 0xF];
}

void append_string_repr(std::string& out, std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  out += quote;
  for (std::size_t offset = 0; offset < text.size();) {
    const std::size_t begin = offset;
    const char32_t c = next_code_point(text, offset);
    if (c == static_cast<unsigned char>(quote) || c == U'\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == U'\n') {
      out += "\\n";
    } else if (c == U'\r') {
      out += "\\r";
    } else if (c == U'\t') {
      out += "\\t";
    } else if (is_printable(c)) {
      out += text.substr(begin, offset - begin);
    } else {
      append_hexadecimal(out, c);
    }
  }
  out += quote;
}

class ReprWriter {
 public:
  explicit ReprWriter(Runtime& runtime) : runtime_(runtime) {}

  void write(const Value& value) {
    const DepthGuard guard(runtime_);
    if (!guard || !runtime_.step() || !runtime_.check_output(out_.size())) return;
    if (value.is_string()) {
      runtime_.step_over(value.string());
      append_string_repr(out_, value.string());
    } else if (value.is_list()) {
      write_list(value.list());
    } else if (value.is_dict()) {
      write_entries("{", value.dict().entries, ": ", "}");
    } else if (const auto* space = value.get_if<Namespace*>()) {
      out_ += "<Namespace ";
      write_entries("{", (*space)->attributes, ": ", "}");
      out_ += '>';
    } else {
      write_scalar(value);
    }
  }

  void write_scalar(const Value& value) {
    if (value.is_undefined()) {
      out_ += "Undefined";
    } else if (value.is_none()) {
      out_ += "None";
    } else if (value.is_bool()) {
      out_ += value.boolean() ? "True" : "False";
    } else if (value.is_integer()) {
      out_ += std::to_string(value.integer());
    } else if (value.is_float()) {
      out_ += float_text(value.real());
    } else {
      out_.append("<").append(value.type_name()).append(">");
    }
  }

  std::string& out() { return out_; }

 private:
  void write_list(const List& list) {
    switch (list.kind) {
      case ListKind::kList:
        return write_items("[", list, "]");
      case ListKind::kTuple:
        return write_items("(", list, list.items.size() == 1 ? ",)" : ")");
      case ListKind::kKeys:
        return write_items("dict_keys([", list, "])");
      case ListKind::kValues:
        return write_items("dict_values([", list, "])");
      case ListKind::kItems:
        return write_items("dict_items([", list, "])");
      case ListKind::kGenerator:
        out_ += "<generator object>";
        return;
    }
  }

  void write_items(std::string_view open, const List& list, std::string_view close) {
    out_ += open;
    bool first = true;
    for (const Value& item : list.items) {
      if (runtime_.failed()) return;
      if (!first) out_ += ", ";
      first = false;
      write(item);
    }
    out_ += close;
  }

  template <typename Entries>
  void write_entries(std::string_view open, const Entries& entries, std::string_view between,
                     std::string_view close) {
    out_ += open;
    bool first = true;
    for (const auto& [key, value] : entries) {
      if (runtime_.failed()) return;
      if (!first) out_ += ", ";
      first = false;
      write(key);
      out_ += between;
      write(value);
    }
    out_ += close;
  }

  Runtime& runtime_;
  std::string out_;
};

}  // namespace

std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::array<char, 40> buffer{};
  const auto written = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                     std::chars_format::scientific);
  const std::string_view text(buffer.data(), static_cast<std::size_t>(written.ptr - buffer.data()));
  const std::size_t e = text.find('e');
  const int exponent = std::atoi(buffer.data() + e + 1);
  std::string digits;
  for (const char c : text.substr(0, e)) {
    if (c != '.' && c != '-') digits += c;
  }
  std::string out = text.front() == '-' ? "-" : "";
  if (exponent < -4 || exponent >= 16) {
    out += digits.substr(0, 1);
    if (digits.size() > 1) out += "." + digits.substr(1);
    const int magnitude = std::abs(exponent);
    return out + (exponent < 0 ? "e-" : "e+") + (magnitude < 10 ? "0" : "") +
           std::to_string(magnitude);
  }
  if (exponent < 0) {
    return out + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  }
  const auto n_whole = static_cast<std::size_t>(exponent) + 1;
  if (digits.size() < n_whole) digits.append(n_whole - digits.size(), '0');
  out += digits.substr(0, n_whole) + ".";
  return out + (digits.size() > n_whole ? digits.substr(n_whole) : "0");
}

std::string_view to_text(Runtime& runtime, const Value& value) {
  if (value.is_string()) return value.string();
  if (value.is_undefined() || runtime.failed()) return "";
  ReprWriter writer(runtime);
  writer.write(value);
  const Value text = runtime.string(writer.out());
  return text.is_string() ? text.string() : std::string_view();
}

}  // namespace spindle::text::jinja
