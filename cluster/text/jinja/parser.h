#pragma once
// Builds the syntax tree of a template.

#include <string_view>

#include "cluster/text/jinja/ast.h"
#include "kernels/core/status.h"

namespace spindle::text::jinja {

// `source` as normalize_source gives it. Errors are kInvalidArgument for malformed templates and
// kUnimplemented for tags outside the subset (README.md); both name line and column.
Result<Body> parse(std::string_view source);

}  // namespace spindle::text::jinja
