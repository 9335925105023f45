// The parser's operands, and what may follow one: attributes, subscripts, calls, filters, tests.

#include <algorithm>
#include <utility>

#include "cluster/text/jinja/expression_height.h"
#include "cluster/text/jinja/expression_parser.h"

namespace spindle::text::jinja {

ExpressionPtr ExpressionParser::parse_primary() {
  const Token token = current();
  switch (token.kind) {
    case TokenKind::kName:
      advance();
      if (token.text == "true" || token.text == "True") {
        return make(token.position, Constant{true}, 0);
      }
      if (token.text == "false" || token.text == "False") {
        return make(token.position, Constant{false}, 0);
      }
      if (token.text == "none" || token.text == "None") return make_none(token.position);
      return make(token.position, Name{token.text}, 0);
    case TokenKind::kString: {
      std::string text;
      while (current().kind == TokenKind::kString) {  // adjacent strings are one
        text += current().text;
        advance();
      }
      return make(token.position, Constant{std::move(text)}, 0);
    }
    case TokenKind::kInteger:
      advance();
      return make(token.position, Constant{token.integer}, 0);
    case TokenKind::kFloat:
      advance();
      return make(token.position, Constant{token.real}, 0);
    case TokenKind::kOperator:
      if (token.text == "(") return parse_parenthesized();
      if (token.text == "[") return parse_list();
      if (token.text == "{") return parse_dict();
      break;
    default:
      break;
  }
  fail("expected an expression, found " + describe(token));
  return make_none(token.position);
}

ExpressionPtr ExpressionParser::parse_parenthesized() {
  const Position position = current().position;
  expect_operator("(");
  if (skip_operator(")")) return make(position, ListLiteral{{}, true}, 0);
  ExpressionPtr inside = parse_tuple(true);
  expect_operator(")");
  return inside;
}

ExpressionPtr ExpressionParser::parse_tuple(bool with_conditional) {
  const Position position = current().position;
  std::vector<ExpressionPtr> items;
  bool is_tuple = false;
  while (true) {
    items.push_back(with_conditional ? parse_expression() : parse_or());
    if (!skip_operator(",")) break;
    is_tuple = true;
    const Token& token = current();
    if (token.kind == TokenKind::kBlockEnd || token.kind == TokenKind::kVariableEnd ||
        token.kind == TokenKind::kEnd || token.is_operator(")")) {
      break;
    }
  }
  if (!is_tuple) return std::move(items.front());
  const std::uint32_t height = tallest_of(items);
  return make(position, ListLiteral{std::move(items), true}, height);
}

ExpressionPtr ExpressionParser::parse_list() {
  const Position position = current().position;
  expect_operator("[");
  std::vector<ExpressionPtr> items;
  while (!failed() && !current().is_operator("]")) {
    items.push_back(parse_expression());
    if (!skip_operator(",")) break;
  }
  expect_operator("]");
  const std::uint32_t height = tallest_of(items);
  return make(position, ListLiteral{std::move(items), false}, height);
}

ExpressionPtr ExpressionParser::parse_dict() {
  const Position position = current().position;
  expect_operator("{");
  std::vector<std::pair<ExpressionPtr, ExpressionPtr>> entries;
  std::uint32_t height = 0;
  while (!failed() && !current().is_operator("}")) {
    ExpressionPtr key = parse_expression();
    expect_operator(":");
    ExpressionPtr value = parse_expression();
    height = std::max(height, tallest(key, value));
    entries.emplace_back(std::move(key), std::move(value));
    if (!skip_operator(",")) break;
  }
  expect_operator("}");
  return make(position, DictLiteral{std::move(entries)}, height);
}

// ---- what may follow an operand ----

ExpressionPtr ExpressionParser::parse_postfix(ExpressionPtr operand) {
  while (true) {
    if (current().is_operator(".")) {
      operand = parse_attribute(std::move(operand));
    } else if (current().is_operator("[")) {
      operand = parse_subscript(std::move(operand));
    } else if (current().is_operator("(")) {
      operand = parse_call(std::move(operand));
    } else {
      return operand;
    }
  }
}

ExpressionPtr ExpressionParser::parse_postfix_and_filters(ExpressionPtr operand) {
  while (true) {
    if (current().is_operator("|")) {
      operand = parse_filters(std::move(operand));
    } else if (current().is_name("is")) {
      operand = parse_test(std::move(operand));
    } else if (current().is_operator("(")) {
      operand = parse_call(std::move(operand));
    } else {
      return operand;
    }
  }
}

ExpressionPtr ExpressionParser::parse_attribute(ExpressionPtr object) {
  const Position position = current().position;
  expect_operator(".");
  const std::uint32_t height = height_of(object);
  if (current().kind == TokenKind::kInteger) {
    ExpressionPtr index = make(current().position, Constant{current().integer}, 0);
    advance();
    return make(position, Subscript{std::move(object), std::move(index)}, height);
  }
  std::string name = expect_name();
  return make(position, Attribute{std::move(object), std::move(name)}, height);
}

ExpressionPtr ExpressionParser::parse_subscript(ExpressionPtr object) {
  const Position position = current().position;
  expect_operator("[");
  const auto at_end = [this] {
    return current().is_operator(":") || current().is_operator("]") || failed();
  };
  ExpressionPtr begin = at_end() ? nullptr : parse_tuple(true);
  if (!current().is_operator(":")) {
    if (begin == nullptr) {
      fail("expected an expression, found " + describe(current()));
      begin = make_none(position);
    }
    expect_operator("]");
    const std::uint32_t height = tallest(object, begin);
    return make(position, Subscript{std::move(object), std::move(begin)}, height);
  }
  expect_operator(":");
  ExpressionPtr end = at_end() ? nullptr : parse_expression();
  ExpressionPtr step;
  if (skip_operator(":")) step = at_end() ? nullptr : parse_expression();
  expect_operator("]");
  const std::uint32_t height = tallest(object, begin, end, step);
  return make(position, Slice{std::move(object), std::move(begin), std::move(end), std::move(step)},
              height);
}

ArgumentList ExpressionParser::parse_arguments() {
  ArgumentList arguments;
  expect_operator("(");
  while (!failed() && !current().is_operator(")")) {
    if (current().is_operator("*") || current().is_operator("**")) {
      fail_unimplemented("unpacking arguments with * is not supported");
    } else if (current().kind == TokenKind::kName && next_token().is_operator("=")) {
      std::string name = expect_name();
      expect_operator("=");
      arguments.keywords.emplace_back(std::move(name), parse_expression());
    } else {
      if (!arguments.keywords.empty()) fail("a positional argument after a keyword argument");
      arguments.positional.push_back(parse_expression());
    }
    if (!skip_operator(",")) break;
  }
  expect_operator(")");
  return arguments;
}

ExpressionPtr ExpressionParser::parse_call(ExpressionPtr function) {
  const Position position = function->position;
  ArgumentList arguments = parse_arguments();
  const std::uint32_t height = std::max(height_of(function), tallest_of(arguments));
  return make(position, Call{std::move(function), std::move(arguments)}, height);
}

ExpressionPtr ExpressionParser::parse_filter(ExpressionPtr input) {
  const Position position = current().position;
  std::string name = expect_name();
  ArgumentList arguments;
  if (current().is_operator("(")) arguments = parse_arguments();
  const std::uint32_t height = std::max(height_of(input), tallest_of(arguments));
  return make(position, FilterCall{std::move(input), std::move(name), std::move(arguments)},
              height);
}

ExpressionPtr ExpressionParser::parse_filters(ExpressionPtr input) {
  while (skip_operator("|")) input = parse_filter(std::move(input));
  return input;
}

ExpressionPtr ExpressionParser::parse_filter_chain_without_pipe() {
  return parse_filters(parse_filter(nullptr));
}

ExpressionPtr ExpressionParser::parse_test(ExpressionPtr input) {
  const Position position = current().position;
  advance();  // "is"
  const bool negated = skip_name("not");
  std::string name = expect_name();
  ArgumentList arguments;
  const Token& token = current();
  const bool begins_operand = token.kind == TokenKind::kName || token.kind == TokenKind::kString ||
                              token.kind == TokenKind::kInteger ||
                              token.kind == TokenKind::kFloat || token.is_operator("[") ||
                              token.is_operator("{");
  const bool is_keyword = token.is_name("else") || token.is_name("or") || token.is_name("and") ||
                          token.is_name("if") || token.is_name("is") || token.is_name("in") ||
                          token.is_name("not");
  if (token.is_operator("(")) {
    arguments = parse_arguments();
  } else if (begins_operand && !is_keyword) {
    arguments.positional.push_back(parse_postfix(parse_primary()));
  } else if (token.is_name("is")) {
    fail("tests cannot be chained with is");
  }
  const std::uint32_t height = std::max(height_of(input), tallest_of(arguments));
  return make(position, TestCall{std::move(input), std::move(name), std::move(arguments), negated},
              height);
}

}  // namespace spindle::text::jinja
