#include "cluster/text/jinja/expression_parser.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

namespace spindle::text::jinja {
namespace {

std::uint32_t height_of(const ExpressionPtr& expression) {
  return expression == nullptr ? 0 : expression->height;
}

template <typename... Expressions>
std::uint32_t tallest(const Expressions&... expressions) {
  return std::max({height_of(expressions)...});
}

std::uint32_t tallest_of(const std::vector<ExpressionPtr>& expressions) {
  std::uint32_t height = 0;
  for (const ExpressionPtr& expression : expressions) {
    height = std::max(height, height_of(expression));
  }
  return height;
}

std::uint32_t tallest_of(const ArgumentList& arguments) {
  std::uint32_t height = tallest_of(arguments.positional);
  for (const auto& [name, expression] : arguments.keywords) {
    height = std::max(height, height_of(expression));
  }
  return height;
}

std::optional<Comparison> comparison_of(std::string_view op) {
  constexpr std::array<std::pair<std::string_view, Comparison>, 6> kComparisons = {{
      {"==", Comparison::kEqual},
      {"!=", Comparison::kNotEqual},
      {"<", Comparison::kLess},
      {"<=", Comparison::kLessEqual},
      {">", Comparison::kGreater},
      {">=", Comparison::kGreaterEqual},
  }};
  for (const auto& [symbol, comparison] : kComparisons) {
    if (op == symbol) return comparison;
  }
  return std::nullopt;
}

std::optional<BinaryOperator> product_operator(std::string_view op) {
  if (op == "*") return BinaryOperator::kMultiply;
  if (op == "/") return BinaryOperator::kDivide;
  if (op == "//") return BinaryOperator::kFloorDivide;
  if (op == "%") return BinaryOperator::kModulo;
  return std::nullopt;
}

std::string describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::kData:
    case TokenKind::kVariableBegin:
    case TokenKind::kBlockBegin:
      return "text";
    case TokenKind::kVariableEnd:
    case TokenKind::kBlockEnd:
      return "the end of the tag";
    case TokenKind::kEnd:
      return "the end of the template";
    case TokenKind::kString:
      return "a string";
    case TokenKind::kInteger:
    case TokenKind::kFloat:
      return "a number";
    case TokenKind::kName:
    case TokenKind::kOperator:
      break;
  }
  return "'" + token.text + "'";
}

// Limits the parser's own recursion; the height limit then bounds everyone else's.
class ParserDepth {
 public:
  explicit ParserDepth(std::uint32_t& depth) : depth_(depth) { ++depth_; }
  ~ParserDepth() { --depth_; }
  ParserDepth(const ParserDepth&) = delete;
  ParserDepth& operator=(const ParserDepth&) = delete;

 private:
  std::uint32_t& depth_;
};

}  // namespace

// ---- tokens ----

const Token& ExpressionParser::current() const { return failed() ? tokens_.back() : tokens_[at_]; }

const Token& ExpressionParser::next_token() const {
  return failed() || at_ + 1 >= tokens_.size() ? tokens_.back() : tokens_[at_ + 1];
}

void ExpressionParser::advance() {
  if (at_ + 1 < tokens_.size()) ++at_;
}

bool ExpressionParser::skip_operator(std::string_view op) {
  if (!current().is_operator(op)) return false;
  advance();
  return true;
}

bool ExpressionParser::skip_name(std::string_view name) {
  if (!current().is_name(name)) return false;
  advance();
  return true;
}

void ExpressionParser::expect_operator(std::string_view op) {
  if (!skip_operator(op)) fail("expected '" + std::string(op) + "', found " + describe(current()));
}

void ExpressionParser::expect_kind(TokenKind kind, std::string_view what) {
  if (current().kind == kind) {
    advance();
  } else {
    fail("expected " + std::string(what) + ", found " + describe(current()));
  }
}

std::string ExpressionParser::expect_name() {
  std::string name = current().text;
  expect_kind(TokenKind::kName, "a name");
  return name;
}

void ExpressionParser::fail(std::string_view message) {
  if (failed()) return;
  status_ = invalid_argument(describe_position(source_, tokens_[at_].position) + ": " +
                             std::string(message));
}

void ExpressionParser::fail_unimplemented(std::string_view message) {
  if (failed()) return;
  status_ = unimplemented(describe_position(source_, tokens_[at_].position) + ": " +
                          std::string(message));
}

template <typename Node>
ExpressionPtr ExpressionParser::make(Position position, Node node,
                                     std::uint32_t height_of_children) {
  if (height_of_children >= kMaxExpressionHeight) {
    fail("the expression is nested too deeply");
    return make_none(position);  // drops the children, so the height stays below the limit
  }
  return std::make_unique<const Expression>(
      Expression{position, height_of_children + 1, std::move(node)});
}

ExpressionPtr ExpressionParser::make_none(Position position) {
  return std::make_unique<const Expression>(Expression{position, 1, Constant{}});
}

// ---- precedence, from loosest to tightest ----

ExpressionPtr ExpressionParser::parse_expression() {
  const ParserDepth guard(depth_);
  const Position position = current().position;
  if (depth_ > kMaxExpressionHeight) {
    fail("the expression is nested too deeply");
    return make_none(position);
  }
  ExpressionPtr value = parse_or();
  while (skip_name("if")) {
    ExpressionPtr condition = parse_or();
    ExpressionPtr if_false = skip_name("else") ? parse_expression() : nullptr;
    const std::uint32_t height = tallest(value, condition, if_false);
    value = make(position,
                 Conditional{std::move(condition), std::move(value), std::move(if_false)}, height);
  }
  return value;
}

ExpressionPtr ExpressionParser::parse_or() {
  const Position position = current().position;
  ExpressionPtr left = parse_and();
  while (skip_name("or")) {
    ExpressionPtr right = parse_and();
    const std::uint32_t height = tallest(left, right);
    left = make(position, Binary{BinaryOperator::kOr, std::move(left), std::move(right)}, height);
  }
  return left;
}

ExpressionPtr ExpressionParser::parse_and() {
  const Position position = current().position;
  ExpressionPtr left = parse_not();
  while (skip_name("and")) {
    ExpressionPtr right = parse_not();
    const std::uint32_t height = tallest(left, right);
    left = make(position, Binary{BinaryOperator::kAnd, std::move(left), std::move(right)}, height);
  }
  return left;
}

ExpressionPtr ExpressionParser::parse_not() {
  const Position position = current().position;
  std::uint32_t n_nots = 0;
  while (skip_name("not")) ++n_nots;
  ExpressionPtr operand = parse_comparison();
  for (; n_nots > 0; --n_nots) {
    const std::uint32_t height = height_of(operand);
    operand = make(position, Unary{UnaryOperator::kNot, std::move(operand)}, height);
  }
  return operand;
}

ExpressionPtr ExpressionParser::parse_comparison() {
  const Position position = current().position;
  ExpressionPtr first = parse_sum();
  std::uint32_t height = height_of(first);
  std::vector<std::pair<Comparison, ExpressionPtr>> rest;
  while (true) {
    std::optional<Comparison> comparison;
    if (current().kind == TokenKind::kOperator) {
      comparison = comparison_of(current().text);
    } else if (current().is_name("in")) {
      comparison = Comparison::kIn;
    } else if (current().is_name("not") && next_token().is_name("in")) {
      comparison = Comparison::kNotIn;
      advance();
    }
    if (!comparison) break;
    advance();
    rest.emplace_back(*comparison, parse_sum());
    height = std::max(height, height_of(rest.back().second));
  }
  if (rest.empty()) return first;
  return make(position, CompareChain{std::move(first), std::move(rest)}, height);
}

ExpressionPtr ExpressionParser::parse_sum() {
  const Position position = current().position;
  ExpressionPtr left = parse_concatenation();
  while (current().is_operator("+") || current().is_operator("-")) {
    const BinaryOperator op =
        current().is_operator("+") ? BinaryOperator::kAdd : BinaryOperator::kSubtract;
    advance();
    ExpressionPtr right = parse_concatenation();
    const std::uint32_t height = tallest(left, right);
    left = make(position, Binary{op, std::move(left), std::move(right)}, height);
  }
  return left;
}

ExpressionPtr ExpressionParser::parse_concatenation() {
  const Position position = current().position;
  ExpressionPtr first = parse_product();
  if (!current().is_operator("~")) return first;
  std::vector<ExpressionPtr> parts;
  parts.push_back(std::move(first));
  while (skip_operator("~")) parts.push_back(parse_product());
  const std::uint32_t height = tallest_of(parts);
  return make(position, Concatenation{std::move(parts)}, height);
}

ExpressionPtr ExpressionParser::parse_product() {
  const Position position = current().position;
  ExpressionPtr left = parse_power();
  while (current().kind == TokenKind::kOperator) {
    const auto op = product_operator(current().text);
    if (!op) break;
    advance();
    ExpressionPtr right = parse_power();
    const std::uint32_t height = tallest(left, right);
    left = make(position, Binary{*op, std::move(left), std::move(right)}, height);
  }
  return left;
}

ExpressionPtr ExpressionParser::parse_power() {
  const Position position = current().position;
  ExpressionPtr left = parse_unary(true);
  while (skip_operator("**")) {
    ExpressionPtr right = parse_unary(true);
    const std::uint32_t height = tallest(left, right);
    left =
        make(position, Binary{BinaryOperator::kPower, std::move(left), std::move(right)}, height);
  }
  return left;
}

ExpressionPtr ExpressionParser::parse_unary(bool with_filters) {
  const ParserDepth guard(depth_);
  const Position position = current().position;
  if (depth_ > kMaxExpressionHeight) {
    fail("the expression is nested too deeply");
    return make_none(position);
  }
  ExpressionPtr operand;
  if (current().is_operator("-") || current().is_operator("+")) {
    const UnaryOperator op =
        current().is_operator("-") ? UnaryOperator::kMinus : UnaryOperator::kPlus;
    advance();
    operand = parse_unary(false);
    const std::uint32_t height = height_of(operand);
    operand = make(position, Unary{op, std::move(operand)}, height);
  } else {
    operand = parse_primary();
  }
  operand = parse_postfix(std::move(operand));
  return with_filters ? parse_postfix_and_filters(std::move(operand)) : std::move(operand);
}

// ---- operands ----

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
  return make(position,
              Slice{std::move(object), std::move(begin), std::move(end), std::move(step)}, height);
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
  const bool begins_operand =
      token.kind == TokenKind::kName || token.kind == TokenKind::kString ||
      token.kind == TokenKind::kInteger || token.kind == TokenKind::kFloat ||
      token.is_operator("[") || token.is_operator("{");
  const bool is_keyword =
      token.is_name("else") || token.is_name("or") || token.is_name("and") || token.is_name("if") ||
      token.is_name("is") || token.is_name("in") || token.is_name("not");
  if (token.is_operator("(")) {
    arguments = parse_arguments();
  } else if (begins_operand && !is_keyword) {
    arguments.positional.push_back(parse_postfix(parse_primary()));
  } else if (token.is_name("is")) {
    fail("tests cannot be chained with is");
  }
  const std::uint32_t height = std::max(height_of(input), tallest_of(arguments));
  return make(position,
              TestCall{std::move(input), std::move(name), std::move(arguments), negated}, height);
}

}  // namespace spindle::text::jinja
