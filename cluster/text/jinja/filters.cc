#include "cluster/text/jinja/filters.h"

#include <string>

namespace spindle::text::jinja {

FilterFunction find_filter(std::string_view name) {
  for (const auto find :
       {find_text_filter, find_sequence_filter, find_selection_filter, find_number_filter}) {
    if (const FilterFunction function = find(name)) return function;
  }
  return nullptr;
}

Value apply_filter(Runtime& runtime, std::string_view name, const Value& input,
                   const Arguments& arguments) {
  const FilterFunction function = find_filter(name);
  if (function == nullptr) {
    return runtime.fail("no filter named '" + std::string(name) + "'");
  }
  return runtime.step() ? function(runtime, input, arguments) : Value();
}

bool apply_test(Runtime& runtime, std::string_view name, const Value& input,
                const Arguments& arguments) {
  const TestFunction function = find_test(name);
  if (function == nullptr) {
    runtime.fail("no test named '" + std::string(name) + "'");
    return false;
  }
  return runtime.step() && function(runtime, input, arguments);
}

}  // namespace spindle::text::jinja
