// Filters over sequences as a whole: length, ends, order, joining, sums.

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "cluster/text/jinja/access.h"
#include "cluster/text/jinja/filters.h"
#include "cluster/text/jinja/operators.h"
#include "cluster/text/jinja/python_strings.h"
#include "cluster/text/jinja/text_form.h"
#include "cluster/text/utf8.h"

namespace spindle::text::jinja {
namespace {

Value as_value(const List* list) { return list; }

// What a filter compares an item by: an attribute of it, without regard to case if asked for.
class KeyGetter {
 public:
  KeyGetter(Runtime& runtime, const Value& attribute, bool case_sensitive)
      : runtime_(runtime), attribute_(attribute), case_sensitive_(case_sensitive) {}

  Value operator()(const Value& item) const {
    Value key = item;
    if (attribute_.is_string()) {
      key = get_path(runtime_, item, attribute_.string());
    } else if (attribute_.is_integer()) {
      key = get_item(runtime_, item, attribute_);
    }
    if (case_sensitive_ || !key.is_string()) return key;
    return runtime_.string(to_lower(key.string()));
  }

 private:
  Runtime& runtime_;
  Value attribute_;
  bool case_sensitive_;
};

struct Keyed {
  Value key;
  Value item;
};

std::vector<Keyed> with_keys(Runtime& runtime, const List& items, const KeyGetter& key_of) {
  std::vector<Keyed> keyed;
  for (const Value& item : items.items) {
    if (!runtime.reserve_memory(sizeof(Keyed)) || !runtime.step()) break;
    keyed.push_back({key_of(item), item});
  }
  return keyed;
}

// Stable. std::sort's comparator must be consistent, which an erroring one is not: after an error
// everything compares equal.
void sort_keyed(Runtime& runtime, std::vector<Keyed>& keyed, bool reverse) {
  std::stable_sort(keyed.begin(), keyed.end(), [&runtime, reverse](const Keyed& a, const Keyed& b) {
    if (!runtime.step()) return false;
    return reverse ? is_less(runtime, b.key, a.key) : is_less(runtime, a.key, b.key);
  });
}

Value items_only(Runtime& runtime, const std::vector<Keyed>& keyed, ListKind kind) {
  List* list = runtime.list(kind);
  for (const Keyed& entry : keyed) runtime.push(*list, entry.item);
  return as_value(list);
}

Value filter_length(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "length", arguments);
  const auto length = length_of(runtime, input);
  if (!length) {
    return runtime.fail("object of type '" + std::string(input.type_name()) + "' has no len()");
  }
  return static_cast<std::int64_t>(*length);
}

Value filter_first(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "first", arguments);
  const List* items = iterate(runtime, input);
  if (items == nullptr || items->items.empty()) return Undefined{"first", "sequence", true};
  return items->items.front();
}

Value filter_last(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "last", arguments);
  const List* items = iterate(runtime, input);
  if (items == nullptr || items->items.empty()) return Undefined{"last", "sequence", true};
  return items->items.back();
}

Value filter_list(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "list", arguments);
  const List* items = iterate(runtime, input);
  if (items == nullptr) return {};
  List* list = runtime.list(ListKind::kList);
  for (const Value& item : items->items) {
    if (runtime.failed()) return {};
    runtime.push(*list, item);
  }
  return as_value(list);
}

Value filter_items(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "items", arguments);
  if (input.is_undefined()) return as_value(runtime.list(ListKind::kGenerator));
  if (!input.is_dict()) return runtime.fail("Can only get item pairs from a mapping.");
  return items_of(runtime, input.dict(), ListKind::kGenerator);
}

Value filter_reverse(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "reverse", arguments);
  const List* items = iterate(runtime, input);
  if (items == nullptr) return {};
  if (input.is_string()) {
    std::string reversed;
    for (auto item = items->items.rbegin(); item != items->items.rend(); ++item) {
      reversed += item->string();
    }
    return runtime.string(reversed);
  }
  List* reversed = runtime.list(ListKind::kGenerator);
  for (auto item = items->items.rbegin(); item != items->items.rend(); ++item) {
    if (runtime.failed()) return {};
    runtime.push(*reversed, *item);
  }
  return as_value(reversed);
}

Value filter_join(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "join", arguments, "d", "attribute");
  const List* items = iterate(runtime, input);
  if (items == nullptr) return {};
  const std::string_view separator = bound.has(0) ? to_text(runtime, bound.value(0)) : "";
  const KeyGetter value_of(runtime, bound.value(1), true);
  std::string joined;
  bool first = true;
  for (const Value& item : items->items) {
    if (!runtime.step() || !runtime.check_output(joined.size())) return {};
    if (!first) joined += separator;
    first = false;
    joined += to_text(runtime, value_of(item));
  }
  return runtime.string(joined);
}

Value filter_sort(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound =
      bind_arguments(runtime, "sort", arguments, "reverse", "case_sensitive", "attribute");
  const List* items = iterate(runtime, input);
  if (items == nullptr) return {};
  if (bound.has(2) && bound.value(2).is_string() &&
      bound.value(2).string().find(',') != std::string_view::npos) {
    return runtime.fail("sort() by several attributes is not supported");
  }
  auto keyed = with_keys(runtime, *items, {runtime, bound.value(2), bound.truth(1, false)});
  sort_keyed(runtime, keyed, bound.truth(0, false));
  return items_only(runtime, keyed, ListKind::kList);
}

Value filter_dictsort(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound =
      bind_arguments(runtime, "dictsort", arguments, "case_sensitive", "by", "reverse");
  if (!input.is_dict()) {
    return runtime.fail("dictsort() takes a dict, not " + std::string(input.type_name()));
  }
  const std::string_view by = bound.string(1).value_or("key");
  if (by != "key" && by != "value") {
    return runtime.fail("dictsort() sorts by either \"key\" or \"value\"");
  }
  const Value items = items_of(runtime, input.dict(), ListKind::kList);
  if (runtime.failed()) return {};
  const Value part(std::int64_t{by == "value"});
  auto keyed = with_keys(runtime, items.list(), {runtime, part, bound.truth(0, false)});
  sort_keyed(runtime, keyed, bound.truth(2, false));
  return items_only(runtime, keyed, ListKind::kList);
}

Value filter_unique(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "unique", arguments, "case_sensitive", "attribute");
  const List* items = iterate(runtime, input);
  if (items == nullptr) return {};
  const KeyGetter key_of(runtime, bound.value(1), bound.truth(0, false));
  Dict* seen = runtime.dict();
  List* unique = runtime.list(ListKind::kGenerator);
  for (const Value& item : items->items) {
    if (runtime.failed()) return {};
    const std::size_t n_before = seen->entries.size();
    runtime.set(*seen, key_of(item), None{});
    if (seen->entries.size() > n_before) runtime.push(*unique, item);
  }
  return as_value(unique);
}

Value extreme(Runtime& runtime, std::string_view name, const Value& input,
              const Arguments& arguments, bool largest) {
  const auto bound = bind_arguments(runtime, name, arguments, "case_sensitive", "attribute");
  const List* items = iterate(runtime, input);
  if (items == nullptr || items->items.empty()) return Undefined{name, "sequence", true};
  const auto keyed = with_keys(runtime, *items, {runtime, bound.value(1), bound.truth(0, false)});
  if (runtime.failed()) return {};
  const Keyed* best = &keyed.front();
  for (const Keyed& entry : keyed) {
    if (&entry == best) continue;
    const bool better =
        largest ? is_less(runtime, best->key, entry.key) : is_less(runtime, entry.key, best->key);
    if (better) best = &entry;
  }
  return best->item;
}

Value filter_min(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return extreme(runtime, "min", input, arguments, false);
}
Value filter_max(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return extreme(runtime, "max", input, arguments, true);
}

Value filter_sum(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "sum", arguments, "attribute", "start");
  const List* items = iterate(runtime, input);
  if (items == nullptr) return {};
  const KeyGetter value_of(runtime, bound.value(0), true);
  Value total = bound.has(1) ? bound.value(1) : Value(std::int64_t{0});
  for (const Value& item : items->items) {
    if (runtime.failed()) return {};
    if (total.is_string()) return runtime.fail("sum() cannot add strings; use join");
    total = apply_binary(runtime, BinaryOperator::kAdd, total, value_of(item));
  }
  return total;
}

constexpr std::array kFilters = std::to_array<NamedFilter>({
    {"count", filter_length},
    {"dictsort", filter_dictsort},
    {"first", filter_first},
    {"items", filter_items},
    {"join", filter_join},
    {"last", filter_last},
    {"length", filter_length},
    {"list", filter_list},
    {"max", filter_max},
    {"min", filter_min},
    {"reverse", filter_reverse},
    {"sort", filter_sort},
    {"sum", filter_sum},
    {"unique", filter_unique},
});

}  // namespace

FilterFunction find_sequence_filter(std::string_view name) { return find_in_table(kFilters, name); }

}  // namespace spindle::text::jinja
