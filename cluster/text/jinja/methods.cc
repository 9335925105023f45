#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "cluster/text/jinja/access.h"
#include "cluster/text/jinja/callable.h"
#include "cluster/text/jinja/operators.h"
#include "cluster/text/jinja/python_strings.h"
#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

// ---- str ----

// Also charges for looking at the whole text.
std::string_view text_of(Runtime& runtime, const Value& receiver) {
  runtime.step_over(receiver.string());
  return receiver.string();
}

void expect_no_arguments(Runtime& runtime, std::string_view name, const Arguments& arguments) {
  if (!arguments.positional.empty() || !arguments.keywords.empty()) {
    runtime.fail(std::string(name) + "() takes no arguments");
  }
}

Value str_strip(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "strip", arguments, "chars");
  const auto characters = bound.string(0);
  if (!runtime.step_over(receiver.string(), characters.value_or(""))) return {};
  return strip_left(strip_right(receiver.string(), characters), characters);
}
Value str_lstrip(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "lstrip", arguments, "chars");
  const auto characters = bound.string(0);
  if (!runtime.step_over(receiver.string(), characters.value_or(""))) return {};
  return strip_left(receiver.string(), characters);
}
Value str_rstrip(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "rstrip", arguments, "chars");
  const auto characters = bound.string(0);
  if (!runtime.step_over(receiver.string(), characters.value_or(""))) return {};
  return strip_right(receiver.string(), characters);
}

Value str_upper(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "upper", arguments);
  return runtime.string(to_upper(text_of(runtime, receiver)));
}
Value str_lower(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "lower", arguments);
  return runtime.string(to_lower(text_of(runtime, receiver)));
}
Value str_title(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "title", arguments);
  return runtime.string(to_title(text_of(runtime, receiver)));
}
Value str_capitalize(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "capitalize", arguments);
  return runtime.string(capitalize(text_of(runtime, receiver)));
}

Value list_of(Runtime& runtime, const std::vector<std::string_view>& parts) {
  List* list = runtime.list(ListKind::kList);
  for (const std::string_view part : parts) {
    if (runtime.failed()) return {};
    runtime.push(*list, part);
  }
  return static_cast<const List*>(list);
}

using SplitFunction = std::vector<std::string_view> (*)(std::string_view,
                                                        std::optional<std::string_view>,
                                                        std::int64_t);

Value split_with(Runtime& runtime, std::string_view name, SplitFunction function,
                 const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, name, arguments, "sep", "maxsplit");
  const auto separator = bound.string(0);
  const std::int64_t max_splits = bound.integer(1, -1);
  if (separator && separator->empty()) return runtime.fail("empty separator");
  const std::string_view text = receiver.string();
  if (!runtime.step_over(text, separator.value_or(""))) return {};
  // A part may take more memory than its text, so make sure of it before cutting.
  std::size_t n_parts =
      separator ? static_cast<std::size_t>(count_occurrences(text, *separator)) : text.size() / 2;
  if (max_splits >= 0) n_parts = std::min(n_parts, static_cast<std::size_t>(max_splits));
  if (!runtime.reserve_memory(n_parts * sizeof(std::string_view))) return {};
  return list_of(runtime, function(text, separator, max_splits));
}

Value str_split(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  return split_with(runtime, "split", split, receiver, arguments);
}
Value str_rsplit(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  return split_with(runtime, "rsplit", split_from_right, receiver, arguments);
}
Value str_splitlines(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "splitlines", arguments, "keepends");
  const std::string_view text = text_of(runtime, receiver);
  if (!runtime.reserve_memory(max_lines(text) * sizeof(std::string_view))) return {};
  if (runtime.failed()) return {};
  return list_of(runtime, split_lines(text, bound.truth(0, false)));
}

// Python also takes a tuple of candidates.
template <typename Predicate>
Value matches_any(Runtime& runtime, std::string_view name, const Arguments& arguments,
                  Predicate matches) {
  const auto bound = bind_arguments(runtime, name, arguments, "candidate");
  const Value candidate = bound.required(0);
  if (candidate.is_string()) {
    return runtime.step_over(candidate.string()) && matches(candidate.string());
  }
  if (candidate.is_list() && candidate.list().kind == ListKind::kTuple) {
    for (const Value& item : candidate.list().items) {
      if (!item.is_string()) continue;
      if (!runtime.step_over(item.string())) return {};
      if (matches(item.string())) return true;
    }
    return false;
  }
  return runtime.fail(std::string(name) + "() takes a str or a tuple of str, not " +
                      std::string(candidate.type_name()));
}

Value str_startswith(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  return matches_any(runtime, "startswith", arguments, [&receiver](std::string_view prefix) {
    return receiver.string().starts_with(prefix);
  });
}
Value str_endswith(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  return matches_any(runtime, "endswith", arguments, [&receiver](std::string_view suffix) {
    return receiver.string().ends_with(suffix);
  });
}

Value str_replace(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "replace", arguments, "old", "new", "count");
  bound.required(0);
  bound.required(1);
  const auto old_text = bound.string(0);
  const auto new_text = bound.string(1);
  return replace_text(runtime, text_of(runtime, receiver), old_text.value_or(""),
                      new_text.value_or(""), bound.integer(2, -1));
}

Value find_from(Runtime& runtime, std::string_view name, const Value& receiver,
                const Arguments& arguments, bool from_right) {
  const auto bound = bind_arguments(runtime, name, arguments, "sub");
  bound.required(0);
  const std::string_view text = receiver.string();
  const std::string_view wanted = bound.string(0).value_or("");
  if (!runtime.step_over(text, wanted)) return {};
  const std::size_t at = from_right ? text.rfind(wanted) : find_bytes(text, wanted);
  if (at == std::string_view::npos) return std::int64_t{-1};
  return static_cast<std::int64_t>(count_code_points(text.substr(0, at)));
}

Value str_find(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  return find_from(runtime, "find", receiver, arguments, false);
}
Value str_rfind(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  return find_from(runtime, "rfind", receiver, arguments, true);
}
Value str_index(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const Value at = find_from(runtime, "index", receiver, arguments, false);
  if (at.is_integer() && at.integer() < 0) return runtime.fail("substring not found");
  return at;
}

Value str_count(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "count", arguments, "sub");
  bound.required(0);
  return count_occurrences(text_of(runtime, receiver), bound.string(0).value_or(""));
}

Value str_join(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "join", arguments, "iterable");
  const Value iterable = bound.required(0);
  const List* items = runtime.failed() ? nullptr : iterate(runtime, iterable);
  if (items == nullptr) return {};
  std::string joined;
  bool first = true;
  for (const Value& item : items->items) {
    if (!item.is_string()) {
      return runtime.fail("join() takes str items, not " + std::string(item.type_name()));
    }
    if (!first) joined += receiver.string();
    first = false;
    joined += item.string();
    if (!runtime.step_over(item.string()) || !runtime.check_output(joined.size())) return {};
  }
  return runtime.string(joined);
}

template <CharacterClass kClass>
Value str_is_class(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "is...", arguments);
  return all_of_class(text_of(runtime, receiver), kClass);
}
Value str_isupper(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "isupper", arguments);
  return is_upper(text_of(runtime, receiver));
}
Value str_islower(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "islower", arguments);
  return is_lower(text_of(runtime, receiver));
}

Value str_removeprefix(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "removeprefix", arguments, "prefix");
  bound.required(0);
  const std::string_view prefix = bound.string(0).value_or("");
  runtime.step_over(prefix);
  std::string_view text = receiver.string();
  if (text.starts_with(prefix)) text.remove_prefix(prefix.size());
  return text;
}
Value str_removesuffix(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "removesuffix", arguments, "suffix");
  bound.required(0);
  const std::string_view suffix = bound.string(0).value_or("");
  runtime.step_over(suffix);
  std::string_view text = receiver.string();
  if (text.ends_with(suffix)) text.remove_suffix(suffix.size());
  return text;
}

// ---- dict ----

Value dict_items(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "items", arguments);
  return items_of(runtime, receiver.dict(), ListKind::kItems);
}
Value dict_keys(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "keys", arguments);
  List* keys = runtime.list(ListKind::kKeys);
  for (const auto& entry : receiver.dict().entries) runtime.push(*keys, entry.first);
  return static_cast<const List*>(keys);
}
Value dict_values(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "values", arguments);
  List* values = runtime.list(ListKind::kValues);
  for (const auto& entry : receiver.dict().entries) runtime.push(*values, entry.second);
  return static_cast<const List*>(values);
}
Value dict_get(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "get", arguments, "key", "default");
  const Value key = bound.required(0);
  if (!runtime.step_over(receiver.dict(), key)) return {};
  if (const Value* value = receiver.dict().find(key)) return *value;
  return bound.has(1) ? bound.value(1) : Value(None{});
}
Value dict_copy(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  expect_no_arguments(runtime, "copy", arguments);
  return receiver;  // values never change
}

// ---- list and tuple ----

Value list_count(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "count", arguments, "value");
  const Value wanted = bound.required(0);
  std::int64_t n = 0;
  for (const Value& item : receiver.list().items) {
    if (runtime.failed()) return {};
    n += equals(runtime, item, wanted);
  }
  return n;
}
Value list_index(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "index", arguments, "value");
  const Value wanted = bound.required(0);
  const auto& items = receiver.list().items;
  for (std::size_t i = 0; i < items.size() && !runtime.failed(); ++i) {
    if (equals(runtime, items[i], wanted)) return static_cast<std::int64_t>(i);
  }
  return runtime.fail("the value is not in the list");
}

// ---- loop ----

Value loop_cycle(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  if (arguments.positional.empty()) return runtime.fail("cycle() needs values");
  const Loop& loop = **receiver.get_if<Loop*>();
  return arguments.positional[loop.index0 % arguments.positional.size()];
}
Value loop_changed(Runtime& runtime, const Value& receiver, const Arguments& arguments) {
  Loop& loop = **receiver.get_if<Loop*>();
  List* values = runtime.list(ListKind::kTuple);
  for (const Value& value : arguments.positional) runtime.push(*values, value);
  const Value now(static_cast<const List*>(values));
  const bool changed = !loop.has_last_changed || !equals(runtime, loop.last_changed, now);
  loop.last_changed = now;
  loop.has_last_changed = true;
  return changed;
}

struct NamedMethod {
  std::string_view name;
  MethodFunction function;
};

constexpr std::array kStringMethods = std::to_array<NamedMethod>({
    {"strip", str_strip},
    {"lstrip", str_lstrip},
    {"rstrip", str_rstrip},
    {"split", str_split},
    {"rsplit", str_rsplit},
    {"splitlines", str_splitlines},
    {"startswith", str_startswith},
    {"endswith", str_endswith},
    {"upper", str_upper},
    {"lower", str_lower},
    {"title", str_title},
    {"capitalize", str_capitalize},
    {"replace", str_replace},
    {"find", str_find},
    {"rfind", str_rfind},
    {"index", str_index},
    {"count", str_count},
    {"join", str_join},
    {"isalpha", str_is_class<CharacterClass::kAlphabetic>},
    {"isdigit", str_is_class<CharacterClass::kDigit>},
    {"isdecimal", str_is_class<CharacterClass::kDecimal>},
    {"isnumeric", str_is_class<CharacterClass::kNumeric>},
    {"isalnum", str_is_class<CharacterClass::kAlphanumeric>},
    {"isspace", str_is_class<CharacterClass::kSpace>},
    {"isupper", str_isupper},
    {"islower", str_islower},
    {"removeprefix", str_removeprefix},
    {"removesuffix", str_removesuffix},
});
constexpr std::array kDictMethods = std::to_array<NamedMethod>({
    {"items", dict_items},
    {"keys", dict_keys},
    {"values", dict_values},
    {"get", dict_get},
    {"copy", dict_copy},
});
constexpr std::array kListMethods = std::to_array<NamedMethod>({
    {"count", list_count},
    {"index", list_index},
});
constexpr std::array kLoopMethods = std::to_array<NamedMethod>({
    {"cycle", loop_cycle},
    {"changed", loop_changed},
});

template <std::size_t kSize>
std::optional<MethodFunction> find_in(const std::array<NamedMethod, kSize>& methods,
                                      std::string_view name) {
  for (const NamedMethod& method : methods) {
    if (method.name == name) return method.function;
  }
  return std::nullopt;
}

}  // namespace

std::optional<MethodFunction> find_method(const Value& receiver, std::string_view name) {
  if (receiver.is_string()) return find_in(kStringMethods, name);
  if (receiver.is_dict()) return find_in(kDictMethods, name);
  if (receiver.is_list() && receiver.list().has_subscripts()) return find_in(kListMethods, name);
  if (receiver.get_if<Loop*>() != nullptr) return find_in(kLoopMethods, name);
  return std::nullopt;
}

}  // namespace spindle::text::jinja
