#pragma once
// What can be called: macros, functions of the template's globals, and methods of values.

#include <optional>
#include <string_view>
#include <variant>

#include "cluster/text/jinja/arguments.h"
#include "cluster/text/jinja/ast.h"
#include "cluster/text/jinja/runtime.h"
#include "cluster/text/jinja/value.h"

namespace spindle::text::jinja {

struct Scope;

using MethodFunction = Value (*)(Runtime&, const Value& receiver, const Arguments&);
using GlobalFunction = Value (*)(Runtime&, const Arguments&);

struct BoundMethod {
  Value receiver;
  MethodFunction function;
};
struct BoundMacro {
  const Macro* macro;
  Scope* closure;  // where its free names are looked up
};

struct Callable {
  std::variant<BoundMethod, BoundMacro, GlobalFunction> target;
};

// The method of that name that values of this type have. Methods that would change a value do not
// exist: values are immutable, as in transformers' sandbox.
std::optional<MethodFunction> find_method(const Value& receiver, std::string_view name);

// range, dict, namespace, raise_exception, strftime_now.
std::optional<GlobalFunction> find_global(std::string_view name);

}  // namespace spindle::text::jinja
