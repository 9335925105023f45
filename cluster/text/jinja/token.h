#pragma once
// Tokens of a template, and places in it.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace spindle::text::jinja {

// Byte offset into the template's source with newlines normalised.
using Position = std::uint32_t;

// "line 3, column 7"; columns count characters, both count from one.
std::string describe_position(std::string_view source, Position position);

enum class TokenKind {
  kData,  // literal text, after white-space control
  kVariableBegin,
  kVariableEnd,
  kBlockBegin,
  kBlockEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd,
};

struct Token {
  TokenKind kind;
  Position position;
  std::string text{};        // data, name, unescaped string, operator
  std::int64_t integer = 0;  // kInteger
  double real = 0;           // kFloat

  bool is_operator(std::string_view wanted) const {
    return kind == TokenKind::kOperator && text == wanted;
  }
  bool is_name(std::string_view wanted) const { return kind == TokenKind::kName && text == wanted; }
};

}  // namespace spindle::text::jinja
