#pragma once
// Python's str() and repr() of values.

#include <string>

#include "cluster/text/jinja/runtime.h"
#include "cluster/text/jinja/value.h"

namespace spindle::text::jinja {

// repr(float): the shortest digits that read back the same; "1.0", "1e+16", "inf".
std::string float_text(double value);

// str(value): what {{ value }} prints. Strings come back as they are, without a copy.
std::string_view to_text(Runtime& runtime, const Value& value);

}  // namespace spindle::text::jinja
