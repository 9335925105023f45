// Filters for numbers, and defaults for missing values.

#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "cluster/text/jinja/filters.h"
#include "cluster/text/jinja/operators.h"
#include "cluster/text/jinja/python_strings.h"

namespace spindle::text::jinja {
namespace {

Value filter_default(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "default", arguments, "default_value", "boolean");
  const bool replaces = input.is_undefined() || (bound.truth(1, false) && !is_truthy(input));
  if (!replaces) return input;
  return bound.has(0) ? bound.value(0) : Value(std::string_view(""));
}

Value filter_abs(Runtime& runtime, const Value& input, const Arguments& arguments) {
  bind_arguments(runtime, "abs", arguments);
  if (input.is_float()) return std::fabs(input.real());
  if (input.is_number()) {
    return input.integer() < 0 ? apply_minus(runtime, input) : Value(input.integer());
  }
  if (input.is_undefined()) return runtime.fail_undefined(input);
  return runtime.fail("abs() takes a number, not " + std::string(input.type_name()));
}

std::optional<std::int64_t> truncate(double value) {
  // 2^63 is the first double that does not fit.
  if (!(value > -9223372036854775809.0 && value < 9223372036854775808.0)) return std::nullopt;
  return static_cast<std::int64_t>(value);
}

Value filter_int(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "int", arguments, "default", "base");
  const Value if_not = bound.has(0) ? bound.value(0) : Value(std::int64_t{0});
  if (input.is_integer() || input.is_bool()) return input.integer();
  std::optional<std::int64_t> integer;
  if (input.is_float()) {
    integer = truncate(input.real());
  } else if (input.is_string()) {
    if (!runtime.step_over(input.string())) return {};
    const std::int64_t base = bound.integer(1, 10);
    if (base < 0 || base > 36) return runtime.fail("int(): the base must be in 0..36");
    integer = python_parse_integer(input.string(), static_cast<int>(base));
    if (!integer) {  // so that "42.9" gives 42
      if (const auto real = python_parse_float(input.string())) integer = truncate(*real);
    }
  } else if (input.is_undefined()) {
    return runtime.fail_undefined(input);
  }
  return integer ? Value(*integer) : if_not;
}

Value filter_float(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "float", arguments, "default");
  if (input.is_number()) return input.real();
  if (input.is_undefined()) return runtime.fail_undefined(input);
  if (input.is_string()) {
    if (!runtime.step_over(input.string())) return {};
    if (const auto real = python_parse_float(input.string())) return *real;
  }
  return bound.has(0) ? bound.value(0) : Value(0.0);
}

// Python's round(): half to even, decided on the exact binary value (printf does the same).
double round_to(double value, std::int64_t precision) {
  if (!std::isfinite(value)) return value;
  if (precision > 300) return value;
  if (precision < -300) return 0.0;
  if (precision <= 0) {
    const double scale = std::pow(10.0, static_cast<double>(-precision));
    return std::nearbyint(value / scale) * scale;
  }
  std::array<char, 700> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.*f", static_cast<int>(precision), value);
  return python_parse_float(buffer.data()).value_or(value);
}

Value filter_round(Runtime& runtime, const Value& input, const Arguments& arguments) {
  const auto bound = bind_arguments(runtime, "round", arguments, "precision", "method");
  const std::int64_t precision = bound.integer(0, 0);
  const std::string_view method = bound.string(1).value_or("common");
  if (input.is_undefined()) return runtime.fail_undefined(input);
  if (!input.is_number()) {
    return runtime.fail("round() takes a number, not " + std::string(input.type_name()));
  }
  if (method == "common") {
    if (!input.is_float() && precision >= 0) return input.integer();  // Python rounds int to int
    return round_to(input.real(), precision);
  }
  if (method != "ceil" && method != "floor") {
    return runtime.fail("round(): the method must be common, ceil or floor");
  }
  const double scale = std::pow(10.0, static_cast<double>(precision));
  const double scaled = input.real() * scale;
  return (method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / scale;
}

constexpr std::array kFilters = std::to_array<NamedFilter>({
    {"abs", filter_abs},
    {"d", filter_default},
    {"default", filter_default},
    {"float", filter_float},
    {"int", filter_int},
    {"round", filter_round},
});

}  // namespace

FilterFunction find_number_filter(std::string_view name) { return find_in_table(kFilters, name); }

}  // namespace spindle::text::jinja
