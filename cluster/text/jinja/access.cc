#include "cluster/text/jinja/access.h"

#include <charconv>
#include <string>
#include <vector>

#include "cluster/text/jinja/callable.h"
#include "cluster/text/jinja/python_strings.h"
#include "cluster/text/jinja/text_form.h"
#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

std::string_view owner_name(const Value& object) {
  if (object.is_dict()) return "dict object";
  if (object.is_list()) return object.type_name();
  if (object.is_string()) return "str object";
  return object.type_name();
}

Value missing(const Value& object, std::string_view name) {
  return Undefined{name, owner_name(object)};
}

Value loop_attribute(const Loop& loop, std::string_view name) {
  const auto integer = [](std::size_t n) { return Value(static_cast<std::int64_t>(n)); };
  const auto& items = loop.items->items;
  const std::size_t i = loop.index0;
  if (name == "index") return integer(i + 1);
  if (name == "index0") return integer(i);
  if (name == "revindex") return integer(items.size() - i);
  if (name == "revindex0") return integer(items.size() - i - 1);
  if (name == "first") return i == 0;
  if (name == "last") return i + 1 == items.size();
  if (name == "length") return integer(items.size());
  // Only recursive loops, which are not supported, are deeper.
  if (name == "depth") return integer(1);
  if (name == "depth0") return integer(0);
  if (name == "previtem") return i > 0 ? items[i - 1] : Value(Undefined{"previtem", "loop"});
  if (name == "nextitem") {
    return i + 1 < items.size() ? items[i + 1] : Value(Undefined{"nextitem", "loop"});
  }
  return Undefined{name, "loop"};
}

Value missing_element(Runtime& runtime, const Value& object, const Value& index) {
  return Undefined{to_text(runtime, index), owner_name(object), true};
}

Value index_list(Runtime& runtime, const Value& object, const Value& key) {
  const auto& items = object.list().items;
  const auto size = static_cast<std::int64_t>(items.size());
  std::int64_t index = key.integer();
  if (index < 0) index += size;
  if (index < 0 || index >= size) return missing_element(runtime, object, key);
  return items[static_cast<std::size_t>(index)];
}

Value index_string(Runtime& runtime, const Value& object, const Value& key) {
  const std::string_view text = object.string();
  if (!runtime.step_over(text)) return {};
  const auto size = static_cast<std::int64_t>(count_code_points(text));
  std::int64_t index = key.integer();
  if (index < 0) index += size;
  if (index < 0 || index >= size) return missing_element(runtime, object, key);
  return code_point_range(text, static_cast<std::size_t>(index),
                          static_cast<std::size_t>(index) + 1);
}

// The indices of a Python slice over `size` items.
struct SliceRange {
  std::int64_t begin;
  std::int64_t end;
  std::int64_t step;
};

std::optional<SliceRange> resolve_slice(Runtime& runtime, std::int64_t size, const Value& begin,
                                        const Value& end, const Value& step) {
  for (const Value* bound : {&begin, &end, &step}) {
    if (!bound->is_none() && !bound->is_integer() && !bound->is_bool()) {
      runtime.fail("slice indices must be integers or none, not " +
                   std::string(bound->type_name()));
      return std::nullopt;
    }
  }
  SliceRange range{0, 0, step.is_none() ? 1 : step.integer()};
  if (range.step == 0) {
    runtime.fail("slice step cannot be zero");
    return std::nullopt;
  }
  const bool backwards = range.step < 0;
  const std::int64_t low = backwards ? -1 : 0;
  const std::int64_t high = backwards ? size - 1 : size;
  const auto resolve = [&](const Value& bound, std::int64_t if_none) {
    if (bound.is_none()) return if_none;
    std::int64_t index = bound.integer();
    if (index < 0) index = index < -size ? low : index + size;
    return std::min(std::max(index, low), high);
  };
  range.begin = resolve(begin, backwards ? high : low);
  range.end = resolve(end, backwards ? low : high);
  return range;
}

Value slice_string(Runtime& runtime, std::string_view text, const SliceRange& range) {
  if (range.step == 1) {
    if (range.end <= range.begin) return std::string_view("");
    return code_point_range(text, static_cast<std::size_t>(range.begin),
                            static_cast<std::size_t>(range.end));
  }
  if (!runtime.reserve_memory(text.size() * sizeof(std::string_view))) return {};
  std::vector<std::string_view> characters;
  for (std::size_t offset = 0; offset < text.size();) {
    const std::size_t begin = offset;
    next_code_point(text, offset);
    characters.push_back(text.substr(begin, offset - begin));
  }
  std::string out;
  for (std::int64_t i = range.begin; range.step > 0 ? i < range.end : i > range.end;) {
    out += characters[static_cast<std::size_t>(i)];
    if (__builtin_add_overflow(i, range.step, &i)) break;
  }
  return runtime.string(out);
}

}  // namespace

Value get_attribute(Runtime& runtime, const Value& object, std::string_view name) {
  if (object.is_undefined()) return runtime.fail_undefined(object);
  // Python's own attributes, which a sandbox hides.
  if (name.starts_with("__")) return missing(object, name);
  if (const auto* loop = object.get_if<Loop*>()) {
    if (name != "cycle" && name != "changed") return loop_attribute(**loop, name);
  }
  if (const auto* space = object.get_if<Namespace*>()) {
    if (!runtime.step(1 + (*space)->attributes.size() / 8)) return {};
    const Value* value = (*space)->find(name);
    return value == nullptr ? missing(object, name) : *value;
  }
  if (const auto method = find_method(object, name)) {
    return static_cast<const Callable*>(
        runtime.make<Callable>(Callable{BoundMethod{object, *method}}));
  }
  if (object.is_dict()) {
    if (!runtime.step_over(object.dict(), name)) return {};
    if (const Value* value = object.dict().find(name)) return *value;
  }
  return missing(object, name);
}

Value get_item(Runtime& runtime, const Value& object, const Value& key) {
  if (object.is_undefined()) return runtime.fail_undefined(object);
  if (object.is_dict()) {
    if (!runtime.step_over(object.dict(), key)) return {};
    if (const Value* value = object.dict().find(key)) return *value;
  } else if (key.is_integer() || key.is_bool()) {
    if (object.is_list() && object.list().has_subscripts()) {
      return index_list(runtime, object, key);
    }
    if (object.is_string()) return index_string(runtime, object, key);
  }
  if (key.is_string()) return get_attribute(runtime, object, key.string());
  return missing_element(runtime, object, key);
}

Value get_path(Runtime& runtime, const Value& object, std::string_view path) {
  Value value = object;
  while (!runtime.failed()) {
    const std::size_t dot = path.find('.');
    const std::string_view part = path.substr(0, dot);
    std::int64_t index = 0;
    const auto parsed = std::from_chars(part.data(), part.data() + part.size(), index);
    const bool is_index = parsed.ec == std::errc() && parsed.ptr == part.data() + part.size();
    value = get_item(runtime, value, is_index ? Value(index) : Value(part));
    if (dot == std::string_view::npos) break;
    path.remove_prefix(dot + 1);
  }
  return value;
}

Value get_slice(Runtime& runtime, const Value& object, const Value& begin, const Value& end,
                const Value& step) {
  if (object.is_undefined()) return runtime.fail_undefined(object);
  if (object.is_string()) {
    if (!runtime.step_over(object.string())) return {};
    const auto size = static_cast<std::int64_t>(count_code_points(object.string()));
    const auto range = resolve_slice(runtime, size, begin, end, step);
    return range ? slice_string(runtime, object.string(), *range) : Value();
  }
  if (!object.is_list() || !object.list().has_subscripts()) {
    return runtime.fail("'" + std::string(object.type_name()) + "' cannot be sliced");
  }
  const auto& items = object.list().items;
  const auto range =
      resolve_slice(runtime, static_cast<std::int64_t>(items.size()), begin, end, step);
  if (!range) return {};
  List* sliced = runtime.list(object.list().kind);
  for (std::int64_t i = range->begin; range->step > 0 ? i < range->end : i > range->end;) {
    if (runtime.failed()) return {};
    runtime.push(*sliced, items[static_cast<std::size_t>(i)]);
    if (__builtin_add_overflow(i, range->step, &i)) break;
  }
  return static_cast<const List*>(sliced);
}

std::optional<std::size_t> length_of(Runtime& runtime, const Value& value) {
  if (value.is_undefined()) return 0;
  if (value.is_string()) {
    runtime.step_over(value.string());
    return count_code_points(value.string());
  }
  if (value.is_dict()) return value.dict().entries.size();
  if (value.is_list() && value.list().has_length()) return value.list().items.size();
  if (const auto* loop = value.get_if<Loop*>()) return (*loop)->items->items.size();
  return std::nullopt;
}

bool is_iterable(const Value& value) {
  return value.is_undefined() || value.is_string() || value.is_list() || value.is_dict() ||
         value.get_if<Loop*>() != nullptr;
}

const List* iterate(Runtime& runtime, const Value& value) {
  if (value.is_list()) return &value.list();
  if (!is_iterable(value) || value.get_if<Loop*>() != nullptr) {
    runtime.fail("'" + std::string(value.type_name()) + "' object is not iterable");
    return nullptr;
  }
  List* items = runtime.list(ListKind::kGenerator);
  if (value.is_string()) {
    const std::string_view text = value.string();
    for (std::size_t offset = 0; offset < text.size() && !runtime.failed();) {
      const std::size_t begin = offset;
      next_code_point(text, offset);
      runtime.push(*items, text.substr(begin, offset - begin));
    }
  } else if (value.is_dict()) {
    for (const auto& entry : value.dict().entries) {
      if (runtime.failed()) break;
      runtime.push(*items, entry.first);
    }
  }
  return items;
}

}  // namespace spindle::text::jinja
