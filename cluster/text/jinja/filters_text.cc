// Filters that make text: case, trimming, indentation, replacement, JSON.

#include <array>
#include <string>

#include "cluster/text/jinja/filters.h"
#include "cluster/text/jinja/json_form.h"
#include "cluster/text/jinja/operators.h"
#include "cluster/text/jinja/python_strings.h"
#include "cluster/text/jinja/text_form.h"
#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

constexpr std::int64_t kMaxIndent = 1024;

// The input as text, charged for.
std::string_view input_text(Runtime& runtime, const Value& input) {
  const std::string_view text = to_text(runtime, input);
  runtime.step_over(text);
  return text;
}

Value filter_upper(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "upper", arguments);
  return runtime.string(to_upper(input_text(runtime, input)));
}

Value filter_lower(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "lower", arguments);
  return runtime.string(to_lower(input_text(runtime, input)));
}

Value filter_capitalize(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "capitalize", arguments);
  return runtime.string(capitalize(input_text(runtime, input)));
}

// Unlike str.title, only white space and opening brackets and dashes begin a word.
Value filter_title(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "title", arguments);
  const std::string_view text = input_text(runtime, input);
  std::string out;
  std::size_t begin = 0;
  const auto flush = [&](std::size_t end) {
    if (begin == end) return;
    std::size_t first_end = begin;
    next_code_point(text, first_end);
    out += to_upper(text.substr(begin, first_end - begin));
    out += to_lower(text.substr(first_end, end - first_end));
    begin = end;
  };
  bool in_separator = false;
  for (std::size_t offset = 0; offset < text.size();) {
    const std::size_t at = offset;
    const char32_t c = next_code_point(text, offset);
    const bool separates =
        is_python_white_space(c) || c == U'-' || c == U'(' || c == U'{' || c == U'[' || c == U'<';
    if (separates != in_separator) flush(at);
    in_separator = separates;
  }
  flush(text.size());
  return runtime.string(out);
}

Value filter_trim(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "trim", arguments, "chars");
  const auto characters = bound.string(0);
  const std::string_view text = to_text(runtime, input);
  if (!runtime.step_over(text, characters.value_or(""))) return {};
  return strip_left(strip_right(text, characters), characters);
}

Value filter_string(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "string", arguments);
  return to_text(runtime, input);
}

// Nothing is escaped here, so nothing needs to be marked as safe.
Value filter_safe(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return filter_string(runtime, input, arguments);
}

Value filter_replace(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "replace", arguments, "old", "new", "count");
  const Value old_text = bound.required(0);
  const Value new_text = bound.required(1);
  return replace_text(runtime, input_text(runtime, input), to_text(runtime, old_text),
                      to_text(runtime, new_text), bound.integer(2, -1));
}

Value filter_indent(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "indent", arguments, "width", "first", "blank");
  if (!input.is_string()) {
    return runtime.fail("indent() takes a str, not " + std::string(input.type_name()));
  }
  std::string indentation;
  if (bound.has(0) && bound.value(0).is_string()) {
    indentation = bound.value(0).string();
  } else {
    const std::int64_t width = bound.integer(0, 4);
    if (width > kMaxIndent) return runtime.fail("indent(): the width is too large");
    indentation.assign(static_cast<std::size_t>(std::max<std::int64_t>(width, 0)), ' ');
  }
  const std::string text = std::string(input_text(runtime, input)) + "\n";
  const std::size_t n_lines = max_lines(text);
  if (!runtime.reserve_memory(n_lines * sizeof(std::string_view)) ||
      !runtime.reserve_memory(n_lines * indentation.size())) {
    return {};
  }
  const bool indents_first = bound.truth(1, false);
  const bool indents_blank = bound.truth(2, false);
  std::string out;
  bool first = true;
  for (const std::string_view line : split_lines(text, false)) {
    if (!first) out += '\n';
    if (first ? indents_first : indents_blank || !line.empty()) out += indentation;
    first = false;
    out += line;
  }
  return runtime.string(out);
}

Value filter_wordcount(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "wordcount", arguments);
  const std::string_view text = input_text(runtime, input);
  std::int64_t n = 0;
  bool in_word = false;
  for (std::size_t offset = 0; offset < text.size();) {
    const bool is_word = !is_python_white_space(next_code_point(text, offset));
    n += is_word && !in_word;
    in_word = is_word;
  }
  return n;
}

// transformers' tojson: json.dumps without the HTML escapes of Jinja's own.
Value filter_tojson(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "tojson", arguments, "ensure_ascii", "indent",
                                    "separators", "sort_keys");
  JsonStyle style;
  style.ensure_ascii = bound.truth(0, false);
  style.sort_keys = bound.truth(3, false);
  if (bound.has(1) && bound.value(1).is_string()) {
    style.indent = std::string(bound.value(1).string());
  } else if (bound.has(1) && !bound.value(1).is_none()) {
    const std::int64_t width = bound.integer(1, 0);
    if (width > kMaxIndent) return runtime.fail("tojson(): the indent is too large");
    style.indent = std::string(static_cast<std::size_t>(std::max<std::int64_t>(width, 0)), ' ');
  }
  if (style.indent && style.indent->size() > static_cast<std::size_t>(kMaxIndent)) {
    return runtime.fail("tojson(): the indent is too large");
  }
  if (style.indent) style.item_separator = ",";
  if (bound.has(2) && !bound.value(2).is_none()) {
    const Value separators = bound.value(2);
    if (!separators.is_list() || separators.list().items.size() != 2 ||
        !separators.list().items[0].is_string() || !separators.list().items[1].is_string()) {
      return runtime.fail("tojson(): separators must be two strings");
    }
    style.item_separator = separators.list().items[0].string();
    style.key_separator = separators.list().items[1].string();
  }
  return to_json(runtime, input, style);
}

constexpr std::array kFilters = std::to_array<NamedFilter>({
    {"capitalize", filter_capitalize},
    {"indent", filter_indent},
    {"lower", filter_lower},
    {"replace", filter_replace},
    {"safe", filter_safe},
    {"string", filter_string},
    {"title", filter_title},
    {"tojson", filter_tojson},
    {"trim", filter_trim},
    {"upper", filter_upper},
    {"wordcount", filter_wordcount},
});

}  // namespace

FilterFunction find_text_filter(std::string_view name) { return find_in_table(kFilters, name); }

}  // namespace spindle::text::jinja
