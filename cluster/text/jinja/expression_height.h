#pragma once
// Heights of expressions under construction, for the parser's limit.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cluster/text/jinja/ast.h"

namespace spindle::text::jinja {

inline std::uint32_t height_of(const ExpressionPtr& expression) {
  return expression == nullptr ? 0 : expression->height;
}

template <typename... Expressions>
std::uint32_t tallest(const Expressions&... expressions) {
  return std::max({height_of(expressions)...});
}

inline std::uint32_t tallest_of(const std::vector<ExpressionPtr>& expressions) {
  std::uint32_t height = 0;
  for (const ExpressionPtr& expression : expressions) {
    height = std::max(height, height_of(expression));
  }
  return height;
}

inline std::uint32_t tallest_of(const ArgumentList& arguments) {
  std::uint32_t height = tallest_of(arguments.positional);
  for (const auto& [name, expression] : arguments.keywords) {
    height = std::max(height, height_of(expression));
  }
  return height;
}

}  // namespace spindle::text::jinja
