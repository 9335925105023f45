#pragma once
// The syntax tree of a template. It is built once by the parser and never changes.
//
// Invariant: no expression is higher than kMaxExpressionHeight and no statements nest deeper than
// kMaxStatementDepth, so recursion over the tree is bounded.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cluster/text/jinja/token.h"

namespace spindle::text::jinja {

inline constexpr std::uint32_t kMaxExpressionHeight = 120;
inline constexpr std::uint32_t kMaxStatementDepth = 60;

struct Expression;
using ExpressionPtr = std::unique_ptr<const Expression>;

struct Constant {
  // monostate is none.
  std::variant<std::monostate, bool, std::int64_t, double, std::string> value;
};
struct Name {
  std::string name;
};
struct ListLiteral {
  std::vector<ExpressionPtr> items;
  bool is_tuple;
};
struct DictLiteral {
  std::vector<std::pair<ExpressionPtr, ExpressionPtr>> entries;
};

enum class UnaryOperator { kNot, kMinus, kPlus };
struct Unary {
  UnaryOperator op;
  ExpressionPtr operand;
};

enum class BinaryOperator {
  kAnd,
  kOr,
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kFloorDivide,
  kModulo,
  kPower,
};
struct Binary {
  BinaryOperator op;
  ExpressionPtr left;
  ExpressionPtr right;
};
struct Concatenation {
  std::vector<ExpressionPtr> parts;
};

enum class Comparison {
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn
};
// a < b <= c: each operand is evaluated once, left to right, until a comparison fails.
struct CompareChain {
  ExpressionPtr first;
  std::vector<std::pair<Comparison, ExpressionPtr>> rest;
};
struct Conditional {
  ExpressionPtr condition;
  ExpressionPtr if_true;
  ExpressionPtr if_false;  // may be null: undefined
};

struct Attribute {
  ExpressionPtr object;
  std::string name;
};
struct Subscript {
  ExpressionPtr object;
  ExpressionPtr index;
};
struct Slice {
  ExpressionPtr object;
  ExpressionPtr begin;  // each may be null
  ExpressionPtr end;
  ExpressionPtr step;
};

struct ArgumentList {
  std::vector<ExpressionPtr> positional;
  std::vector<std::pair<std::string, ExpressionPtr>> keywords;
};
struct Call {
  ExpressionPtr function;
  ArgumentList arguments;
};
struct FilterCall {
  ExpressionPtr input;  // null in a filter block: the block's text
  std::string name;
  ArgumentList arguments;
};
struct TestCall {
  ExpressionPtr input;
  std::string name;
  ArgumentList arguments;
  bool negated;
};

struct Expression {
  Position position;
  std::uint32_t height;  // 1 for a leaf
  std::variant<Constant, Name, ListLiteral, DictLiteral, Unary, Binary, Concatenation, CompareChain,
               Conditional, Attribute, Subscript, Slice, Call, FilterCall, TestCall>
      node;
};

struct Statement;
using Body = std::vector<Statement>;

// What "set" and "for" assign to: a name, an attribute of a namespace, or several of them.
struct Target {
  Position position = 0;
  std::string name{};
  std::string attribute{};      // of the namespace `name`; empty for a plain name
  std::vector<Target> parts{};  // not empty: a tuple, and the name is unused
};

struct Data {
  std::string text;
};
struct Print {
  ExpressionPtr expression;
};
struct If {
  std::vector<std::pair<ExpressionPtr, Body>> branches;
  Body otherwise;
};
struct For {
  Target target;
  ExpressionPtr iterable;
  ExpressionPtr filter;  // may be null
  Body body;
  Body otherwise;
};
struct Set {
  Target target;
  ExpressionPtr value;
};
struct SetBlock {
  Target target;
  ExpressionPtr filter;  // a chain of FilterCalls whose innermost input is null, or null
  Body body;
};
struct With {
  std::vector<std::pair<Target, ExpressionPtr>> assignments;
  Body body;
};
struct Parameter {
  std::string name;
  ExpressionPtr if_absent;  // may be null: undefined
};
struct Macro {
  std::string name;
  std::vector<Parameter> parameters;
  Body body;
};
// {% call f(x) %} body {% endcall %}: f(x, caller=the body as a macro).
struct CallBlock {
  ExpressionPtr call;
  std::unique_ptr<const Macro> caller;
};
struct FilterBlock {
  ExpressionPtr filter;
  Body body;
};
// {% generation %}: its own scope, no other effect.
struct Generation {
  Body body;
};
struct Break {};
struct Continue {};

struct Statement {
  Position position;
  std::variant<Data, Print, If, For, Set, SetBlock, With, Macro, CallBlock, FilterBlock, Generation,
               Break, Continue>
      node;
};

}  // namespace spindle::text::jinja
