#pragma once
// Arguments of a call, and their binding to the parameters of a built-in function.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cluster/text/jinja/runtime.h"
#include "cluster/text/jinja/value.h"

namespace spindle::text::jinja {

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string_view, Value>> keywords;

  // Without the first `n` positional arguments.
  Arguments after(std::size_t n) const;
};

// Arguments matched to parameter names as Python does it. Too many, unknown or doubled ones fail
// with the function's name.
template <std::size_t kParameters>
class BoundArguments {
 public:
  BoundArguments(Runtime& runtime, std::string_view function, const Arguments& arguments,
                 const std::array<std::string_view, kParameters>& names)
      : runtime_(runtime), function_(function), names_(names) {
    for (std::size_t i = 0; i < arguments.positional.size(); ++i) {
      if (i >= kParameters) {
        runtime.fail(std::string(function) + "() takes at most " + std::to_string(kParameters) +
                     " arguments");
        return;
      }
      values_[i] = arguments.positional[i];
    }
    for (const auto& [name, value] : arguments.keywords) bind(name, value);
  }

  bool has(std::size_t index) const { return values_[index].has_value(); }
  // The value, or undefined if it was not given.
  Value value(std::size_t index) const { return values_[index].value_or(Value()); }
  // Fails if it was not given.
  Value required(std::size_t index) const {
    if (!has(index)) {
      return runtime_.fail(std::string(function_) + "() misses the argument '" +
                           std::string(names_[index]) + "'");
    }
    return *values_[index];
  }
  // These fail if the value has another type; none counts as not given.
  std::optional<std::string_view> string(std::size_t index) const {
    if (!is_given(index)) return std::nullopt;
    if (values_[index]->is_string()) return values_[index]->string();
    fail_type(index, "str");
    return std::nullopt;
  }
  std::int64_t integer(std::size_t index, std::int64_t if_absent) const {
    if (!is_given(index)) return if_absent;
    if (values_[index]->is_integer() || values_[index]->is_bool()) {
      return values_[index]->integer();
    }
    fail_type(index, "int");
    return if_absent;
  }
  bool truth(std::size_t index, bool if_absent) const {
    return has(index) ? is_truthy(*values_[index]) : if_absent;
  }

 private:
  bool is_given(std::size_t index) const { return has(index) && !values_[index]->is_none(); }

  void bind(std::string_view name, const Value& value) {
    for (std::size_t i = 0; i < kParameters; ++i) {
      if (names_[i] != name) continue;
      if (values_[i]) {
        runtime_.fail(std::string(function_) + "() got the argument '" + std::string(name) +
                      "' twice");
      }
      values_[i] = value;
      return;
    }
    runtime_.fail(std::string(function_) + "() has no argument '" + std::string(name) + "'");
  }

  void fail_type(std::size_t index, std::string_view wanted) const {
    runtime_.fail(std::string(function_) + "(): '" + std::string(names_[index]) + "' must be " +
                  std::string(wanted) + ", not " + std::string(values_[index]->type_name()));
  }

  Runtime& runtime_;
  std::string_view function_;
  std::array<std::string_view, kParameters> names_;
  std::array<std::optional<Value>, kParameters> values_{};
};

template <typename... Names>
auto bind_arguments(Runtime& runtime, std::string_view function, const Arguments& arguments,
                    Names... names) {
  return BoundArguments<sizeof...(Names)>(runtime, function, arguments,
                                          {std::string_view(names)...});
}

}  // namespace spindle::text::jinja
