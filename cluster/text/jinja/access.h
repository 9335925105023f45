#pragma once
// Attributes, subscripts, slices, lengths and iteration of values.

#include <cstddef>
#include <optional>
#include <string_view>

#include "cluster/text/jinja/runtime.h"
#include "cluster/text/jinja/value.h"

namespace spindle::text::jinja {

// object.name: a method, then a key. Undefined if there is neither; fails on undefined objects.
Value get_attribute(Runtime& runtime, const Value& object, std::string_view name);

// object[key]: a key or an index, then (for strings) an attribute.
Value get_item(Runtime& runtime, const Value& object, const Value& key);

// "a.b.0" as filters take it: each part is a key or an index.
Value get_path(Runtime& runtime, const Value& object, std::string_view path);

// object[begin:end:step]; each bound is none or an integer.
Value get_slice(Runtime& runtime, const Value& object, const Value& begin, const Value& end,
                const Value& step);

// len(value); nothing if it has none.
std::optional<std::size_t> length_of(Runtime& runtime, const Value& value);

// The items that iterating gives: of a list, keys of a dict, characters of a string, nothing for
// undefined. nullptr (and an error) if the value cannot be iterated.
const List* iterate(Runtime& runtime, const Value& value);

bool is_iterable(const Value& value);

}  // namespace spindle::text::jinja
