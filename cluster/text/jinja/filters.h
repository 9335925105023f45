#pragma once
// The filters and tests of the template language, by name.

#include <string_view>

#include "cluster/text/jinja/arguments.h"
#include "cluster/text/jinja/runtime.h"
#include "cluster/text/jinja/value.h"

namespace spindle::text::jinja {

using FilterFunction = Value (*)(Runtime&, const Value& input, const Arguments&);
using TestFunction = bool (*)(Runtime&, const Value& input, const Arguments&);

struct NamedFilter {
  std::string_view name;
  FilterFunction function;
};

// nullptr if there is none of that name.
FilterFunction find_filter(std::string_view name);
TestFunction find_test(std::string_view name);

// Fail if the name is unknown.
Value apply_filter(Runtime& runtime, std::string_view name, const Value& input,
                   const Arguments& arguments);
bool apply_test(Runtime& runtime, std::string_view name, const Value& input,
                const Arguments& arguments);

// The parts of the filter table, one for each source file; nullptr if the name is of another part.
FilterFunction find_text_filter(std::string_view name);
FilterFunction find_sequence_filter(std::string_view name);
FilterFunction find_selection_filter(std::string_view name);
FilterFunction find_number_filter(std::string_view name);

template <std::size_t kSize>
FilterFunction find_in_table(const std::array<NamedFilter, kSize>& filters, std::string_view name) {
  for (const NamedFilter& filter : filters) {
    if (filter.name == name) return filter.function;
  }
  return nullptr;
}

}  // namespace spindle::text::jinja
