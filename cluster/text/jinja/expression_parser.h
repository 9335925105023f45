#pragma once
// The parser's half for expressions: recursive descent with Jinja's precedence.

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cluster/text/jinja/ast.h"
#include "cluster/text/jinja/token.h"
#include "kernels/core/status.h"

namespace spindle::text::jinja {

// Errors are sticky: after the first one the current token is the end, so all loops finish, and
// what is returned means nothing (but is never null).
//
// Thread-safety: none.
class ExpressionParser {
 public:
  ExpressionParser(std::string_view source, std::vector<Token> tokens)
      : source_(source), tokens_(std::move(tokens)) {}

  const Status& status() const { return status_; }

 protected:
  // ---- tokens ----
  const Token& current() const;
  const Token& next_token() const;
  void advance();
  bool skip_operator(std::string_view op);
  bool skip_name(std::string_view name);
  void expect_operator(std::string_view op);
  void expect_kind(TokenKind kind, std::string_view what);
  std::string expect_name();
  void fail(std::string_view message);
  void fail_unimplemented(std::string_view message);
  bool failed() const { return !status_.ok(); }
  static std::string describe(const Token& token);  // for "found ..."

  // ---- expressions ----
  ExpressionPtr parse_expression();
  ExpressionPtr parse_or();
  // One expression, or a tuple without parentheses.
  ExpressionPtr parse_tuple(bool with_conditional);
  // "|name(args)|..." after `input`, which may be null.
  ExpressionPtr parse_filters(ExpressionPtr input);
  // "name(args)" of the first filter has no "|" before it.
  ExpressionPtr parse_filter_chain_without_pipe();

 private:
  ExpressionPtr parse_and();
  ExpressionPtr parse_not();
  ExpressionPtr parse_comparison();
  ExpressionPtr parse_sum();
  ExpressionPtr parse_concatenation();
  ExpressionPtr parse_product();
  ExpressionPtr parse_power();
  ExpressionPtr parse_unary(bool with_filters);
  ExpressionPtr parse_primary();
  ExpressionPtr parse_parenthesized();
  ExpressionPtr parse_list();
  ExpressionPtr parse_dict();
  ExpressionPtr parse_postfix(ExpressionPtr operand);
  ExpressionPtr parse_postfix_and_filters(ExpressionPtr operand);
  ExpressionPtr parse_attribute(ExpressionPtr object);
  ExpressionPtr parse_subscript(ExpressionPtr object);
  ExpressionPtr parse_call(ExpressionPtr function);
  ExpressionPtr parse_filter(ExpressionPtr input);
  ExpressionPtr parse_test(ExpressionPtr input);
  ArgumentList parse_arguments();

  // Every expression is made here, which keeps the trees below the height limit.
  template <typename Node>
  ExpressionPtr make(Position position, Node node, std::uint32_t height_of_children) {
    if (height_of_children >= kMaxExpressionHeight) {
      fail("the expression is nested too deeply");
      return make_none(position);  // drops the children, so the height stays below the limit
    }
    return std::make_unique<const Expression>(
        Expression{position, height_of_children + 1, std::move(node)});
  }
  ExpressionPtr make_none(Position position);

  std::string_view source_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  std::uint32_t depth_ = 0;
  Status status_;
};

}  // namespace spindle::text::jinja
