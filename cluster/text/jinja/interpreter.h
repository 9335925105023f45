#pragma once
// Runs a template.

#include <boost/json.hpp>
#include <string>

#include "cluster/text/jinja/ast.h"
#include "cluster/text/jinja/runtime.h"
#include "kernels/core/status.h"

namespace spindle::text::jinja {

// Renders `body` with the members of `context` as variables, and those of `defaults` that are not
// in it. All arguments must live until it returns; the result is independent of them.
Result<std::string> render(const Body& body, const boost::json::object& context,
                           const boost::json::object& defaults, Runtime& runtime);

}  // namespace spindle::text::jinja
