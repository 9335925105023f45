#include "cluster/text/jinja/json_form.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cluster/text/jinja/operators.h"
#include "cluster/text/jinja/text_form.h"
#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

class JsonWriter {
 public:
  JsonWriter(Runtime& runtime, const JsonStyle& style) : runtime_(runtime), style_(style) {}

  void write(const Value& value) {
    const DepthGuard guard(runtime_);
    if (!guard || !runtime_.step() || !runtime_.check_output(out_.size())) return;
    if (value.is_none()) {
      out_ += "null";
    } else if (value.is_bool()) {
      out_ += value.boolean() ? "true" : "false";
    } else if (value.is_integer()) {
      out_ += std::to_string(value.integer());
    } else if (value.is_float()) {
      write_float(value.real());
    } else if (value.is_string()) {
      write_string(value.string());
    } else if (value.is_list() && value.list().has_subscripts()) {
      write_list(value.list());
    } else if (value.is_dict()) {
      write_dict(value.dict());
    } else {
      runtime_.fail("Object of type " + std::string(value.type_name()) +
                    " is not JSON serializable");
    }
  }

  const std::string& out() const { return out_; }

 private:
  void write_float(double value) {
    if (std::isnan(value)) {
      out_ += "NaN";
    } else if (std::isinf(value)) {
      out_ += value < 0 ? "-Infinity" : "Infinity";
    } else {
      out_ += float_text(value);
    }
  }

  void append_unicode_escape(char32_t unit) {
    constexpr std::string_view kDigits = "0123456789abcdef";
    out_ += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out_ += kDigits[(unit >> shift) & 0xF];
  }

  void write_string(std::string_view text) {
    if (!runtime_.step_over(text)) return;
    out_ += '"';
    for (std::size_t offset = 0; offset < text.size();) {
      const std::size_t begin = offset;
      const char32_t c = next_code_point(text, offset);
      constexpr std::string_view kSpecial = "\"\\\n\r\t\b\f";
      constexpr std::string_view kNames = "\"\\nrtbf";
      const std::size_t special =
          c < 0x80 ? kSpecial.find(static_cast<char>(c)) : std::string_view::npos;
      if (special != std::string_view::npos) {
        out_ += '\\';
        out_ += kNames[special];
      } else if (c < 0x20 || (style_.ensure_ascii && c >= 0x7F && c < 0x10000)) {
        append_unicode_escape(c);
      } else if (c >= 0x10000 && style_.ensure_ascii) {
        append_unicode_escape(0xD800 + ((c - 0x10000) >> 10));
        append_unicode_escape(0xDC00 + ((c - 0x10000) & 0x3FF));
      } else {
        out_ += text.substr(begin, offset - begin);
      }
    }
    out_ += '"';
  }

  void new_line() {
    if (!style_.indent) return;
    out_ += '\n';
    for (std::size_t i = 0; i < level_; ++i) out_ += *style_.indent;
  }

  void write_list(const List& list) {
    if (list.items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[';
    ++level_;
    bool first = true;
    for (const Value& item : list.items) {
      if (runtime_.failed()) return;
      if (!first) out_ += style_.item_separator;
      first = false;
      new_line();
      write(item);
    }
    --level_;
    new_line();
    out_ += ']';
  }

  void write_dict(const Dict& dict) {
    if (dict.entries.empty()) {
      out_ += "{}";
      return;
    }
    std::vector<std::pair<Value, Value>> entries(dict.entries.begin(), dict.entries.end());
    if (style_.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(), [this](const auto& a, const auto& b) {
        return is_less(runtime_, a.first, b.first);
      });
    }
    out_ += '{';
    ++level_;
    bool first = true;
    for (const auto& [key, value] : entries) {
      if (runtime_.failed()) return;
      if (!first) out_ += style_.item_separator;
      first = false;
      new_line();
      write_key(key);
      out_ += style_.key_separator;
      write(value);
    }
    --level_;
    new_line();
    out_ += '}';
  }

  void write_key(const Value& key) {
    if (key.is_string()) return write_string(key.string());
    if (!key.is_none() && !key.is_number()) {
      runtime_.fail("keys must be str, int, float, bool or None, not " +
                    std::string(key.type_name()));
      return;
    }
    out_ += '"';
    write(key);
    out_ += '"';
  }

  Runtime& runtime_;
  const JsonStyle& style_;
  std::string out_;
  std::size_t level_ = 0;
};

// Everything else relies on valid strings, and a caller may have made the context from anything.
Value checked_string(Runtime& runtime, boost::json::string_view json) {
  const std::string_view text(json.data(), json.size());
  if (const auto offset = find_invalid_utf8(text)) {
    return runtime.fail("a string of the context is not valid UTF-8 at byte " +
                        std::to_string(*offset));
  }
  return text;
}

Value from_array(Runtime& runtime, const boost::json::array& array) {
  List* list = runtime.list(ListKind::kList);
  for (const auto& item : array) {
    if (runtime.failed()) break;
    runtime.push(*list, from_json(runtime, item));
  }
  return static_cast<const List*>(list);
}

Value from_object(Runtime& runtime, const boost::json::object& object) {
  Dict* dict = runtime.dict();
  for (const auto& [key, value] : object) {
    if (runtime.failed()) break;
    runtime.append(*dict, checked_string(runtime, key), from_json(runtime, value));
  }
  return static_cast<const Dict*>(dict);
}

}  // namespace

Value from_json(Runtime& runtime, const boost::json::value& json) {
  const DepthGuard guard(runtime);
  if (!guard) return {};
  switch (json.kind()) {
    case boost::json::kind::null:
      return None{};
    case boost::json::kind::bool_:
      return json.get_bool();
    case boost::json::kind::int64:
      return json.get_int64();
    case boost::json::kind::uint64:
      if (json.get_uint64() > std::numeric_limits<std::int64_t>::max()) {
        return runtime.fail("the integer " + std::to_string(json.get_uint64()) +
                            " does not fit 64 bits");
      }
      return static_cast<std::int64_t>(json.get_uint64());
    case boost::json::kind::double_:
      return json.get_double();
    case boost::json::kind::string:
      return checked_string(runtime, json.get_string());
    case boost::json::kind::array:
      return from_array(runtime, json.get_array());
    case boost::json::kind::object:
      return from_object(runtime, json.get_object());
  }
  return {};
}

Value to_json(Runtime& runtime, const Value& value, const JsonStyle& style) {
  JsonWriter writer(runtime, style);
  writer.write(value);
  return runtime.string(writer.out());
}

}  // namespace spindle::text::jinja
