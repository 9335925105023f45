#pragma once
// Python's operators on values.

#include <cstdint>
#include <string_view>

#include "cluster/text/jinja/ast.h"
#include "cluster/text/jinja/runtime.h"
#include "cluster/text/jinja/value.h"

namespace spindle::text::jinja {

// Every binary operator but "and" and "or", which do not always evaluate their right side.
Value apply_binary(Runtime& runtime, BinaryOperator op, const Value& left, const Value& right);
Value apply_minus(Runtime& runtime, const Value& operand);
Value apply_plus(Runtime& runtime, const Value& operand);
bool apply_comparison(Runtime& runtime, Comparison op, const Value& left, const Value& right);

// left == right; containers compare by value.
bool equals(Runtime& runtime, const Value& left, const Value& right);

// left < right, for numbers, strings, and lists or tuples of them. Fails for other types.
bool is_less(Runtime& runtime, const Value& left, const Value& right);

// item in container.
bool contains(Runtime& runtime, const Value& container, const Value& item);

// str.replace, with the size of the result checked before it is made.
Value replace_text(Runtime& runtime, std::string_view text, std::string_view old_text,
                   std::string_view new_text, std::int64_t max_count);

// The (key, value) tuples of a dict, in a list of that kind.
Value items_of(Runtime& runtime, const Dict& dict, ListKind kind);

}  // namespace spindle::text::jinja
