#include "cluster/text/jinja/lexer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace spindle::text::jinja {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// Data tokens as they are, tags as "{{", "}}", "{%", "%}", everything else as its text.
std::vector<std::string> pieces(std::string_view source) {
  const auto tokens = tokenize(normalize_source(source));
  EXPECT_TRUE(tokens.ok()) << tokens.status().to_string();
  std::vector<std::string> found;
  if (!tokens.ok()) return found;
  for (const Token& token : *tokens) {
    switch (token.kind) {
      case TokenKind::kVariableBegin:
        found.emplace_back("{{");
        break;
      case TokenKind::kVariableEnd:
        found.emplace_back("}}");
        break;
      case TokenKind::kBlockBegin:
        found.emplace_back("{%");
        break;
      case TokenKind::kBlockEnd:
        found.emplace_back("%}");
        break;
      case TokenKind::kInteger:
        found.push_back(std::to_string(token.integer));
        break;
      case TokenKind::kEnd:
        break;
      default:
        found.push_back(token.text);
    }
  }
  return found;
}

TEST(Lexer, BlocksTakeTheirLine) {
  EXPECT_THAT(pieces("a\n  {% x %}\nb"), ElementsAre("a\n", "{%", "x", "%}", "b"));
  EXPECT_THAT(pieces("a  {% x %}\n\nb"), ElementsAre("a  ", "{%", "x", "%}", "\nb"));
  EXPECT_THAT(pieces("a\n  {{ x }}\nb"), ElementsAre("a\n  ", "{{", "x", "}}", "\nb"));
  EXPECT_THAT(pieces("a\n  {# x #}\nb"), ElementsAre("a\n", "b"));
  EXPECT_THAT(pieces("{% x %}\n  {% y %}"), ElementsAre("{%", "x", "%}", "{%", "y", "%}"));
}

TEST(Lexer, SignsControlWhiteSpace) {
  EXPECT_THAT(pieces("a \n{%- x -%} \n b"), ElementsAre("a", "{%", "x", "%}", "b"));
  EXPECT_THAT(pieces("a \n{{- x -}} \n b"), ElementsAre("a", "{{", "x", "}}", "b"));
  EXPECT_THAT(pieces("a\n  {%+ x +%}\nb"), ElementsAre("a\n  ", "{%", "x", "%}", "\nb"));
  EXPECT_THAT(pieces("a {#- x -#} b"), ElementsAre("a", "b"));
}

TEST(Lexer, SourceIsNormalized) {
  EXPECT_EQ(normalize_source("a\r\nb\rc\n\n"), "a\nb\nc\n");
  EXPECT_EQ(normalize_source("\n"), "");
}

TEST(Lexer, ClosingBracesInsideOfBrackets) {
  EXPECT_THAT(pieces("{{ {'a': {}}}}"), ElementsAre("{{", "{", "a", ":", "{", "}", "}", "}}"));
}

TEST(Lexer, Literals) {
  EXPECT_THAT(pieces(R"({{ 'a\n\'\x41\u00e9\U0001F642\101\d' 1_0 0x1F }})"),
              ElementsAre("{{", "a\n'Aé🙂A\\d", "10", "31", "}}"));
  EXPECT_THAT(pieces("{{ a.0.5 }}"), ElementsAre("{{", "a", ".", "0", ".", "5", "}}"));
}

TEST(Lexer, RawIsLeftAlone) {
  EXPECT_THAT(pieces("{% raw %} {{ x }} {% endraw %}!"), ElementsAre(" {{ x }} ", "!"));
}

TEST(Lexer, ErrorsNameThePlace) {
  for (const auto& [source, place, what] :
       std::vector<std::tuple<std::string, std::string, std::string>>{
           {"a\n{{ x", "line 2, column 1", "not closed"},
           {"é {# x", "line 1, column 3", "comment"},
           {"{{ 'x }}", "line 1, column 4", "string"},
           {"{{ @ }}", "line 1, column 4", "unexpected character"},
           {"{{ (] }}", "line 1, column 5", "unexpected ']'"},
           {"{{ '\\xZZ' }}", "line 1, column 5", "escape"},
           {"{{ '\\ud83d' }}", "line 1, column 5", "escape"},
           {"{{ 99999999999999999999 }}", "line 1, column 4", "64 bits"},
           {"{% raw %} x", "line 1, column 1", "endraw"},
       }) {
    const auto tokens = tokenize(source);
    EXPECT_EQ(tokens.status().code(), StatusCode::kInvalidArgument) << source;
    EXPECT_THAT(tokens.status().message(), HasSubstr(place)) << source;
    EXPECT_THAT(tokens.status().message(), HasSubstr(what)) << source;
  }
}

}  // namespace
}  // namespace spindle::text::jinja
