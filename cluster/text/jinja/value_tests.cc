// The tests of the template language: what may follow "is".

#include <array>
#include <string>

#include "cluster/text/jinja/access.h"
#include "cluster/text/jinja/filters.h"
#include "cluster/text/jinja/operators.h"
#include "cluster/text/jinja/python_strings.h"
#include "cluster/text/jinja/text_form.h"

namespace spindle::text::jinja {
namespace {

Value only_argument(Runtime& runtime, const Arguments& arguments) {
  if (arguments.positional.size() == 1 && arguments.keywords.empty()) {
    return arguments.positional.front();
  }
  return runtime.fail("the test takes one argument");
}

template <Comparison kComparison>
bool test_comparison(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const Value other = only_argument(runtime, arguments);
  return !runtime.failed() && apply_comparison(runtime, kComparison, input, other);
}

bool test_divisible(Runtime& runtime, const Value& input, const Value& divisor,
                    std::int64_t remainder) {
  const Value rest = apply_binary(runtime, BinaryOperator::kModulo, input, divisor);
  return rest.is_number() && numbers_equal(rest, Value(remainder));
}
bool test_divisibleby(Runtime& runtime, const Value& input, const Arguments& arguments) {
  return test_divisible(runtime, input, only_argument(runtime, arguments), 0);
}
bool test_even(Runtime& runtime, const Value& input, const Arguments&) {
  return test_divisible(runtime, input, Value(std::int64_t{2}), 0);
}
bool test_odd(Runtime& runtime, const Value& input, const Arguments&) {
  return test_divisible(runtime, input, Value(std::int64_t{2}), 1);
}

bool test_defined(Runtime&, const Value& input, const Arguments&) { return !input.is_undefined(); }
bool test_undefined(Runtime&, const Value& input, const Arguments&) { return input.is_undefined(); }
bool test_none(Runtime&, const Value& input, const Arguments&) { return input.is_none(); }
bool test_boolean(Runtime&, const Value& input, const Arguments&) { return input.is_bool(); }
bool test_true(Runtime&, const Value& input, const Arguments&) {
  return input.is_bool() && input.boolean();
}
bool test_false(Runtime&, const Value& input, const Arguments&) {
  return input.is_bool() && !input.boolean();
}
bool test_integer(Runtime&, const Value& input, const Arguments&) { return input.is_integer(); }
bool test_float(Runtime&, const Value& input, const Arguments&) { return input.is_float(); }
bool test_number(Runtime&, const Value& input, const Arguments&) { return input.is_number(); }
bool test_string(Runtime&, const Value& input, const Arguments&) { return input.is_string(); }
bool test_mapping(Runtime&, const Value& input, const Arguments&) { return input.is_dict(); }
bool test_iterable(Runtime&, const Value& input, const Arguments&) { return is_iterable(input); }
bool test_sequence(Runtime&, const Value& input, const Arguments&) {
  return input.is_undefined() || input.is_string() || input.is_dict() ||
         (input.is_list() && input.list().has_subscripts());
}
bool test_callable(Runtime&, const Value& input, const Arguments&) {
  return input.get_if<const Callable*>() != nullptr;
}
bool test_upper(Runtime& runtime, const Value& input, const Arguments&) {
  const std::string_view text = to_text(runtime, input);
  return runtime.step_over(text) && is_upper(text);
}
bool test_lower(Runtime& runtime, const Value& input, const Arguments&) {
  const std::string_view text = to_text(runtime, input);
  return runtime.step_over(text) && is_lower(text);
}
bool test_in(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const Value container = only_argument(runtime, arguments);
  return !runtime.failed() && contains(runtime, container, input);
}
bool test_filter(Runtime&, const Value& input, const Arguments&) {
  return input.is_string() && find_filter(input.string()) != nullptr;
}
bool test_test(Runtime&, const Value& input, const Arguments&) {
  return input.is_string() && find_test(input.string()) != nullptr;
}
// Identity. Equal small values are one object in Python too; containers are compared by address.
bool test_sameas(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const Value other = only_argument(runtime, arguments);
  if (runtime.failed() || input.type_name() != other.type_name()) return false;
  if (input.is_list()) return &input.list() == &other.list();
  if (input.is_dict()) return &input.dict() == &other.dict();
  return equals(runtime, input, other);
}

struct NamedTest {
  std::string_view name;
  TestFunction function;
};

constexpr std::array kTests = std::to_array<NamedTest>({
    {"!=", test_comparison<Comparison::kNotEqual>},
    {"<", test_comparison<Comparison::kLess>},
    {"<=", test_comparison<Comparison::kLessEqual>},
    {"==", test_comparison<Comparison::kEqual>},
    {">", test_comparison<Comparison::kGreater>},
    {">=", test_comparison<Comparison::kGreaterEqual>},
    {"boolean", test_boolean},
    {"callable", test_callable},
    {"defined", test_defined},
    {"divisibleby", test_divisibleby},
    {"eq", test_comparison<Comparison::kEqual>},
    {"equalto", test_comparison<Comparison::kEqual>},
    {"even", test_even},
    {"false", test_false},
    {"filter", test_filter},
    {"float", test_float},
    {"ge", test_comparison<Comparison::kGreaterEqual>},
    {"greaterthan", test_comparison<Comparison::kGreater>},
    {"gt", test_comparison<Comparison::kGreater>},
    {"in", test_in},
    {"integer", test_integer},
    {"iterable", test_iterable},
    {"le", test_comparison<Comparison::kLessEqual>},
    {"lessthan", test_comparison<Comparison::kLess>},
    {"lower", test_lower},
    {"lt", test_comparison<Comparison::kLess>},
    {"mapping", test_mapping},
    {"ne", test_comparison<Comparison::kNotEqual>},
    {"none", test_none},
    {"number", test_number},
    {"odd", test_odd},
    {"sameas", test_sameas},
    {"sequence", test_sequence},
    {"string", test_string},
    {"test", test_test},
    {"true", test_true},
    {"undefined", test_undefined},
    {"upper", test_upper},
});

}  // namespace

TestFunction find_test(std::string_view name) {
  for (const NamedTest& test : kTests) {
    if (test.name == name) return test.function;
  }
  return nullptr;
}

}  // namespace spindle::text::jinja
