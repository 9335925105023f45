#include "cluster/text/jinja/expression_parser.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "cluster/text/jinja/expression_height.h"

namespace spindle::text::jinja {
namespace {

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

std::string ExpressionParser::describe(const Token& token) {
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
    value = make(position, Conditional{std::move(condition), std::move(value), std::move(if_false)},
                 height);
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

}  // namespace spindle::text::jinja
