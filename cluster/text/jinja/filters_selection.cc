// Filters that apply another filter or test to every item: map, select and their kin.

#include <array>
#include <string>

#include "cluster/text/jinja/access.h"
#include "cluster/text/jinja/filters.h"

namespace spindle::text::jinja {
namespace {

Value attribute_of(Runtime& runtime, const Value& item, const Value& attribute) {
  if (attribute.is_string()) return get_path(runtime, item, attribute.string());
  return get_item(runtime, item, attribute);
}

// The items of the input; none for a falsy input, even one that cannot be iterated.
const List* items_of_input(Runtime& runtime, const Value& input) {
  return is_truthy(input) ? iterate(runtime, input) : runtime.list(ListKind::kGenerator);
}

// map(attribute="x", default=...)
Value map_attribute(Runtime& runtime, const List& items, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "map", arguments, "attribute", "default");
  const Value attribute = bound.required(0);
  List* mapped = runtime.list(ListKind::kGenerator);
  for (const Value& item : items.items) {
    if (runtime.failed()) return {};
    Value value = attribute_of(runtime, item, attribute);
    if (value.is_undefined() && bound.has(1)) value = bound.value(1);
    runtime.push(*mapped, value);
  }
  return static_cast<const List*>(mapped);
}

Value filter_map(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const List* items = items_of_input(runtime, input);
  if (items == nullptr) return {};
  if (arguments.positional.empty()) return map_attribute(runtime, *items, arguments);
  const Value name = arguments.positional.front();
  if (!name.is_string()) return runtime.fail("map() takes the name of a filter");
  // "map('map', 'map', ...)" is recursion by template.
  const DepthGuard guard(runtime);
  if (!guard) return {};
  const Arguments rest = arguments.after(1);
  List* mapped = runtime.list(ListKind::kGenerator);
  for (const Value& item : items->items) {
    if (runtime.failed()) return {};
    runtime.push(*mapped, apply_filter(runtime, name.string(), item, rest));
  }
  return static_cast<const List*>(mapped);
}

// The items, or items with an attribute, that pass (or fail) a test; truth without a test.
Value select_items(Runtime& runtime, std::string_view filter, const Value& input,
                   const Arguments& arguments, bool by_attribute, bool wanted) {
  const List* items = items_of_input(runtime, input);
  if (items == nullptr) return {};
  const std::size_t n_leading = by_attribute ? 1 : 0;
  if (arguments.positional.size() < n_leading) {
    return runtime.fail(std::string(filter) + "() needs the name of an attribute");
  }
  const bool has_test = arguments.positional.size() > n_leading;
  const Value test = has_test ? arguments.positional[n_leading] : Value(None{});
  if (has_test && !test.is_string()) {
    return runtime.fail(std::string(filter) + "() takes the name of a test");
  }
  const Arguments rest = arguments.after(n_leading + 1);
  List* selected = runtime.list(ListKind::kGenerator);
  for (const Value& item : items->items) {
    if (!runtime.step()) return {};
    const Value subject =
        by_attribute ? attribute_of(runtime, item, arguments.positional.front()) : item;
    const bool passes =
        has_test ? apply_test(runtime, test.string(), subject, rest) : is_truthy(subject);
    if (passes == wanted) runtime.push(*selected, item);
  }
  return static_cast<const List*>(selected);
}

Value filter_select(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return select_items(runtime, "select", input, arguments, false, true);
}
Value filter_reject(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return select_items(runtime, "reject", input, arguments, false, false);
}
Value filter_selectattr(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return select_items(runtime, "selectattr", input, arguments, true, true);
}
Value filter_rejectattr(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return select_items(runtime, "rejectattr", input, arguments, true, false);
}

Value filter_attr(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "attr", arguments, "name");
  bound.required(0);
  const auto name = bound.string(0);
  if (runtime.failed() || !name) return {};
  // Unlike a dot, it never looks at the keys of a dict.
  if (input.is_dict()) {
    const Dict* nothing = runtime.dict();
    return get_attribute(runtime, nothing, *name);
  }
  return get_attribute(runtime, input, *name);
}

constexpr std::array kFilters = std::to_array<NamedFilter>({
    {"attr", filter_attr},
    {"map", filter_map},
    {"reject", filter_reject},
    {"rejectattr", filter_rejectattr},
    {"select", filter_select},
    {"selectattr", filter_selectattr},
});

}  // namespace

FilterFunction find_selection_filter(std::string_view name) {
  return find_in_table(kFilters, name);
}

}  // namespace spindle::text::jinja
