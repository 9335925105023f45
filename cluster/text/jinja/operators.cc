#include "cluster/text/jinja/operators.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cluster/text/jinja/python_strings.h"

namespace spindle::text::jinja {
namespace {

std::string_view symbol_of(BinaryOperator op) {
  switch (op) {
    case BinaryOperator::kAnd:
      return "and";
    case BinaryOperator::kOr:
      return "or";
    case BinaryOperator::kAdd:
      return "+";
    case BinaryOperator::kSubtract:
      return "-";
    case BinaryOperator::kMultiply:
      return "*";
    case BinaryOperator::kDivide:
      return "/";
    case BinaryOperator::kFloorDivide:
      return "//";
    case BinaryOperator::kModulo:
      return "%";
    case BinaryOperator::kPower:
      return "**";
  }
  return "?";
}

Value fail_types(Runtime& runtime, std::string_view symbol, const Value& left, const Value& right) {
  return runtime.fail("unsupported operand types for " + std::string(symbol) + ": '" +
                      std::string(left.type_name()) + "' and '" + std::string(right.type_name()) +
                      "'");
}

Value power(Runtime& runtime, std::int64_t base, std::int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) return runtime.fail("0 cannot be raised to a negative power");
    return std::pow(static_cast<double>(base), static_cast<double>(exponent));
  }
  std::int64_t result = 1;
  bool overflows = false;
  while (exponent > 0 && !overflows) {
    if ((exponent & 1) != 0) overflows = __builtin_mul_overflow(result, base, &result);
    exponent >>= 1;
    if (exponent > 0) overflows = overflows || __builtin_mul_overflow(base, base, &base);
  }
  if (overflows) return runtime.fail("the integer result does not fit 64 bits");
  return result;
}

Value apply_to_integers(Runtime& runtime, BinaryOperator op, std::int64_t a, std::int64_t b) {
  std::int64_t result = 0;
  bool overflows = false;
  switch (op) {
    case BinaryOperator::kAdd:
      overflows = __builtin_add_overflow(a, b, &result);
      break;
    case BinaryOperator::kSubtract:
      overflows = __builtin_sub_overflow(a, b, &result);
      break;
    case BinaryOperator::kMultiply:
      overflows = __builtin_mul_overflow(a, b, &result);
      break;
    case BinaryOperator::kPower:
      return power(runtime, a, b);
    default:
      if (b == 0) return runtime.fail("division by zero");
      if (op == BinaryOperator::kDivide) return static_cast<double>(a) / static_cast<double>(b);
      if (b == -1) {  // the one divisor whose quotient can overflow
        if (op == BinaryOperator::kModulo) return std::int64_t{0};
        overflows = __builtin_sub_overflow(std::int64_t{0}, a, &result);
        break;
      }
      // C++ rounds to zero, Python down.
      const bool rounds_up = a % b != 0 && (a % b < 0) != (b < 0);
      if (op == BinaryOperator::kFloorDivide) return a / b - (rounds_up ? 1 : 0);
      return a % b + (rounds_up ? b : 0);
  }
  if (overflows) return runtime.fail("the integer result does not fit 64 bits");
  return result;
}

Value apply_to_floats(Runtime& runtime, BinaryOperator op, double a, double b) {
  switch (op) {
    case BinaryOperator::kAdd:
      return a + b;
    case BinaryOperator::kSubtract:
      return a - b;
    case BinaryOperator::kMultiply:
      return a * b;
    case BinaryOperator::kPower:
      if (a == 0 && b < 0) return runtime.fail("0.0 cannot be raised to a negative power");
      if (a < 0 && b != std::floor(b)) return runtime.fail("the power is a complex number");
      return std::pow(a, b);
    default:
      break;
  }
  if (b == 0) return runtime.fail("float division by zero");
  if (op == BinaryOperator::kDivide) return a / b;
  double remainder = std::fmod(a, b);
  if (remainder != 0 && (remainder < 0) != (b < 0)) remainder += b;
  if (op == BinaryOperator::kModulo) return remainder == 0 ? std::copysign(0.0, b) : remainder;
  return std::floor((a - remainder) / b + 0.5);
}

Value repeat_string(Runtime& runtime, std::string_view text, std::int64_t count) {
  if (count <= 0 || text.empty()) return std::string_view("");
  std::size_t n_bytes = 0;
  if (__builtin_mul_overflow(text.size(), static_cast<std::size_t>(count), &n_bytes)) {
    n_bytes = static_cast<std::size_t>(-1) / 2;  // refused just below
  }
  char* buffer = runtime.string_buffer(n_bytes);
  if (buffer == nullptr) return {};
  for (std::size_t at = 0; at < n_bytes; at += text.size()) text.copy(buffer + at, text.size());
  return std::string_view(buffer, n_bytes);
}

Value repeat_list(Runtime& runtime, const List& list, std::int64_t count) {
  List* repeated = runtime.list(list.kind);
  for (std::int64_t i = 0; i < count && !list.items.empty(); ++i) {
    for (const Value& item : list.items) runtime.push(*repeated, item);
    if (runtime.failed()) break;
  }
  return static_cast<const List*>(repeated);
}

Value concatenate(Runtime& runtime, const Value& left, const Value& right) {
  if (left.is_string() && right.is_string()) {
    const std::string_view a = left.string();
    const std::string_view b = right.string();
    char* buffer = runtime.string_buffer(a.size() + b.size());
    if (buffer == nullptr) return {};
    a.copy(buffer, a.size());
    b.copy(buffer + a.size(), b.size());
    return std::string_view(buffer, a.size() + b.size());
  }
  if (left.is_list() && right.is_list() && left.list().kind == right.list().kind &&
      left.list().has_subscripts()) {
    List* joined = runtime.list(left.list().kind);
    for (const Value& item : left.list().items) runtime.push(*joined, item);
    for (const Value& item : right.list().items) runtime.push(*joined, item);
    return static_cast<const List*>(joined);
  }
  return fail_types(runtime, "+", left, right);
}

bool is_integral(const Value& value) { return value.is_integer() || value.is_bool(); }

Value repeat(Runtime& runtime, const Value& left, const Value& right) {
  const Value& sequence = is_integral(left) ? right : left;
  const Value& count = is_integral(left) ? left : right;
  if (is_integral(count)) {
    if (sequence.is_string()) return repeat_string(runtime, sequence.string(), count.integer());
    if (sequence.is_list() && sequence.list().has_subscripts()) {
      return repeat_list(runtime, sequence.list(), count.integer());
    }
  }
  return fail_types(runtime, "*", left, right);
}

bool lists_equal(Runtime& runtime, const List& left, const List& right) {
  if (&left == &right) return true;
  if (left.kind != right.kind || !left.has_subscripts()) return false;
  return std::equal(left.items.begin(), left.items.end(), right.items.begin(), right.items.end(),
                    [&runtime](const Value& a, const Value& b) { return equals(runtime, a, b); });
}

bool dicts_equal(Runtime& runtime, const Dict& left, const Dict& right) {
  if (&left == &right) return true;
  if (left.entries.size() != right.entries.size()) return false;
  return std::all_of(left.entries.begin(), left.entries.end(),
                     [&runtime, &right](const auto& entry) {
                       const Value* other = right.find(entry.first);
                       return runtime.step_over(right, entry.first) && other != nullptr &&
                              equals(runtime, entry.second, *other);
                     });
}

template <typename Pointer>
bool same_object(const Value& left, const Value& right) {
  const Pointer* a = left.get_if<Pointer>();
  const Pointer* b = right.get_if<Pointer>();
  return a != nullptr && b != nullptr && *a == *b;
}

bool lists_less(Runtime& runtime, const List& left, const List& right) {
  const DepthGuard guard(runtime);
  if (!guard) return false;
  const std::size_t n_common = std::min(left.items.size(), right.items.size());
  for (std::size_t i = 0; i < n_common && runtime.step(); ++i) {
    if (!equals(runtime, left.items[i], right.items[i])) {
      return is_less(runtime, left.items[i], right.items[i]);
    }
  }
  return left.items.size() < right.items.size();
}

}  // namespace

Value apply_binary(Runtime& runtime, BinaryOperator op, const Value& left, const Value& right) {
  if (left.is_undefined()) return runtime.fail_undefined(left);
  if (right.is_undefined()) return runtime.fail_undefined(right);
  if (left.is_number() && right.is_number()) {
    if (left.is_float() || right.is_float()) {
      return apply_to_floats(runtime, op, left.real(), right.real());
    }
    return apply_to_integers(runtime, op, left.integer(), right.integer());
  }
  if (op == BinaryOperator::kAdd) return concatenate(runtime, left, right);
  if (op == BinaryOperator::kMultiply) return repeat(runtime, left, right);
  if (op == BinaryOperator::kModulo && left.is_string()) {
    return runtime.fail("formatting with % is not supported");
  }
  return fail_types(runtime, symbol_of(op), left, right);
}

Value apply_minus(Runtime& runtime, const Value& operand) {
  if (operand.is_float()) return -operand.real();
  if (is_integral(operand)) {
    return apply_to_integers(runtime, BinaryOperator::kSubtract, 0, operand.integer());
  }
  if (operand.is_undefined()) return runtime.fail_undefined(operand);
  return runtime.fail("bad operand type for unary -: '" + std::string(operand.type_name()) + "'");
}

Value apply_plus(Runtime& runtime, const Value& operand) {
  if (operand.is_float()) return operand;
  if (is_integral(operand)) return operand.integer();
  if (operand.is_undefined()) return runtime.fail_undefined(operand);
  return runtime.fail("bad operand type for unary +: '" + std::string(operand.type_name()) + "'");
}

bool equals(Runtime& runtime, const Value& left, const Value& right) {
  const DepthGuard guard(runtime);
  if (!guard || !runtime.step()) return false;
  if (left.is_string() && right.is_string()) {
    return left.string().size() == right.string().size() && runtime.step_over(left.string()) &&
           left.string() == right.string();
  }
  if (left.is_list() && right.is_list()) return lists_equal(runtime, left.list(), right.list());
  if (left.is_dict() && right.is_dict()) return dicts_equal(runtime, left.dict(), right.dict());
  if (left.is_undefined()) return right.is_undefined();
  return keys_equal(left, right) || same_object<Namespace*>(left, right) ||
         same_object<const Callable*>(left, right) || same_object<Loop*>(left, right);
}

bool is_less(Runtime& runtime, const Value& left, const Value& right) {
  if (left.is_number() && right.is_number()) {
    if (left.is_float() || right.is_float()) return left.real() < right.real();
    return left.integer() < right.integer();
  }
  // UTF-8 sorts as its code points do.
  if (left.is_string() && right.is_string()) {
    return runtime.step_over(left.string()) && left.string() < right.string();
  }
  if (left.is_list() && right.is_list() && left.list().kind == right.list().kind &&
      left.list().has_subscripts()) {
    return lists_less(runtime, left.list(), right.list());
  }
  if (left.is_undefined()) {
    runtime.fail_undefined(left);
  } else if (right.is_undefined()) {
    runtime.fail_undefined(right);
  } else {
    runtime.fail("'" + std::string(left.type_name()) + "' and '" + std::string(right.type_name()) +
                 "' have no order");
  }
  return false;
}

bool contains(Runtime& runtime, const Value& container, const Value& item) {
  if (container.is_string()) {
    if (item.is_undefined()) {
      runtime.fail_undefined(item);
      return false;
    }
    if (!item.is_string()) {
      runtime.fail("'in <string>' requires a string, not " + std::string(item.type_name()));
      return false;
    }
    return runtime.step_over(container.string()) &&
           find_bytes(container.string(), item.string()) != std::string_view::npos;
  }
  if (container.is_list()) {
    for (const Value& candidate : container.list().items) {
      if (!runtime.step()) return false;
      if (equals(runtime, candidate, item)) return true;
    }
    return false;
  }
  if (container.is_dict()) {
    if (!item.is_undefined() && !is_hashable(item)) {
      runtime.fail("unhashable type: '" + std::string(item.type_name()) + "'");
      return false;
    }
    return runtime.step_over(container.dict(), item) && container.dict().find(item) != nullptr;
  }
  if (container.is_undefined()) return false;  // iterates as nothing
  runtime.fail("argument of type '" + std::string(container.type_name()) + "' is not iterable");
  return false;
}

bool apply_comparison(Runtime& runtime, Comparison op, const Value& left, const Value& right) {
  switch (op) {
    case Comparison::kEqual:
      return equals(runtime, left, right);
    case Comparison::kNotEqual:
      return !equals(runtime, left, right);
    case Comparison::kLess:
      return is_less(runtime, left, right);
    case Comparison::kGreater:
      return is_less(runtime, right, left);
    case Comparison::kLessEqual:
      // Not "not greater", which NaN would make true.
      return is_less(runtime, left, right) || (!runtime.failed() && equals(runtime, left, right));
    case Comparison::kGreaterEqual:
      return is_less(runtime, right, left) || (!runtime.failed() && equals(runtime, left, right));
    case Comparison::kIn:
      return contains(runtime, right, left);
    case Comparison::kNotIn:
      return !contains(runtime, right, left);
  }
  return false;
}

Value replace_text(Runtime& runtime, std::string_view text, std::string_view old_text,
                   std::string_view new_text, std::int64_t max_count) {
  if (!runtime.step_over(text)) return {};
  std::int64_t n = count_occurrences(text, old_text);
  if (max_count >= 0) n = std::min(n, max_count);
  std::size_t added_bytes = 0;
  if (__builtin_mul_overflow(static_cast<std::size_t>(n), new_text.size(), &added_bytes) ||
      !runtime.reserve_memory(added_bytes)) {
    return runtime.fail("the replaced text is too long");
  }
  return runtime.string(replace(text, old_text, new_text, max_count));
}

Value items_of(Runtime& runtime, const Dict& dict, ListKind kind) {
  List* items = runtime.list(kind);
  for (const auto& [key, value] : dict.entries) {
    if (runtime.failed()) return {};
    List* pair = runtime.list(ListKind::kTuple);
    runtime.push(*pair, key);
    runtime.push(*pair, value);
    runtime.push(*items, static_cast<const List*>(pair));
  }
  return static_cast<const List*>(items);
}

}  // namespace spindle::text::jinja
