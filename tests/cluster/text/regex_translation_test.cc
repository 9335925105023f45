#include "cluster/text/regex_translation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cluster/text/split_pattern.h"

namespace spindle::text {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> matches(std::string_view regex, std::string_view text) {
  const auto pattern = SplitPattern::compile(regex);
  EXPECT_TRUE(pattern.ok()) << pattern.status().to_string();
  if (!pattern.ok()) return {};
  PatternScratch scratch;
  std::vector<PatternSpan> spans;
  const Status status = pattern->find_all(text, Deadline::after_ms(10'000), scratch, spans);
  EXPECT_TRUE(status.ok()) << status.to_string();
  std::vector<std::string> found;
  for (const PatternSpan& span : spans) {
    if (span.is_match) found.emplace_back(text.substr(span.begin, span.end - span.begin));
  }
  return found;
}

TEST(RegexTranslation, WhiteSpaceIsUnicodeWhiteSpace) {
  EXPECT_THAT(matches(R"(\s+)", "a \u00a0\u2003b\u0085c"), ElementsAre(" \u00a0\u2003", "\u0085"));
  // PCRE2's own \s would take the Mongolian vowel separator.
  EXPECT_THAT(matches(R"(\s)", "a\u180eb"), ElementsAre());
  EXPECT_THAT(matches(R"(\S+)", "a\u180eb c"), ElementsAre("a\u180eb", "c"));
  EXPECT_THAT(matches(R"([^\s]+)", "a b"), ElementsAre("a", "b"));
  EXPECT_THAT(matches(R"([\S]+)", "a b"), ElementsAre("a", "b"));
}

TEST(RegexTranslation, WordCharacters) {
  EXPECT_THAT(matches(R"(\w+)", "ab_1é e\u0301-x\u203fy ²"),
              ElementsAre("ab_1é", "e\u0301", "x\u203fy", "²"));
  EXPECT_THAT(matches(R"([\w]+)", "a²"), ElementsAre("a"));
  EXPECT_THAT(matches(R"(\W)", "a-b"), ElementsAre("-"));
  EXPECT_THAT(matches(R"(\b\w)", "ab e\u0301f"), ElementsAre("a", "e"));
}

TEST(RegexTranslation, AnchorsAreMultiLine) {
  EXPECT_THAT(matches("^a", "a\nab\rac"), ElementsAre("a", "a"));
  EXPECT_THAT(matches("a$", "a\na"), ElementsAre("a", "a"));
  EXPECT_THAT(matches(R"(\Aa)", "a\na"), ElementsAre("a"));
  EXPECT_THAT(matches(".+", "a\nb"), ElementsAre("a", "b"));
}

TEST(RegexTranslation, IntervalsRepeatAndDoNotPossess) {
  EXPECT_THAT(matches(R"(\p{N}{1,3}+)", "1234567"), ElementsAre("1234567"));
  EXPECT_THAT(matches(R"(x(?:ab){2}+)", "xabababab"), ElementsAre("xabababab"));
  EXPECT_THAT(matches(R"([ab]{2}+c)", "ababac abc"), ElementsAre("babac", "abc"));
  EXPECT_THAT(matches(R"(\p{N}{1,3})", "1234567"), ElementsAre("123", "456", "7"));
  EXPECT_THAT(matches("a{,", "a{,"), ElementsAre("a{,"));
}

TEST(RegexTranslation, CaseFoldsWithinAGroup) {
  EXPECT_THAT(matches("(?i:'s|'t)", "'S 's 'ſ 'T"), ElementsAre("'S", "'s", "'ſ", "'T"));
  EXPECT_THAT(matches("(?i)a|b", "AB"), ElementsAre("A", "B"));
}

TEST(RegexTranslation, EscapesAndLiterals) {
  EXPECT_THAT(matches(R"(\u00e9|\x41|\x{1F642})", "éA🙂"), ElementsAre("é", "A", "🙂"));
  EXPECT_THAT(matches(R"(\v)", "\v\n\f"), ElementsAre("\v"));
  EXPECT_EQ(escape_regex("a.b*é"), "a\\.b\\*é");
}

TEST(RegexTranslation, RefusesByName) {
  for (const auto& [regex, named] : std::vector<std::pair<std::string, std::string>>{
           {R"(\h)", "\\h"},
           {R"(a\K)", "\\K"},
           {R"((a)\1)", "\\1"},
           {"[a[bc]]", "class inside a class"},
           {"[a&&b]", "intersection"},
           {"a(?m:b)", "(?m:"},
           {"a(?i)b", "(?i)"},
           {"(?<name>a)", "(?<n"},
           {"a{2}?", "optional interval"},
           {R"([\W])", "\\W"},
           {"(*UTF)", "quantifier"},
           {"[abc", "unclosed class"},
           {R"(\pL)", "braces"},
       }) {
    const auto translated = translate_regex(regex);
    EXPECT_EQ(translated.status().code(), StatusCode::kUnimplemented) << regex;
    EXPECT_THAT(translated.status().message(), HasSubstr(named));
  }
  EXPECT_EQ(SplitPattern::compile("(a").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(SplitPattern::compile(R"(\p{Nonsense})").status().code(), StatusCode::kInvalidArgument);
}

TEST(SplitPattern, EmptyMatchesAdvance) {
  EXPECT_THAT(matches("b*", "abba"), ElementsAre("", "bb", ""));
  EXPECT_THAT(matches("(?=é)", "aéé"), ElementsAre("", ""));
}

TEST(SplitPattern, RunawayMatchingIsAnError) {
  const std::string text(5000, 'a');
  PatternScratch scratch;
  std::vector<PatternSpan> spans;
  // Exponential backtracking at one position.
  const auto exponential = SplitPattern::compile("(?:a+)+b");
  ASSERT_TRUE(exponential.ok());
  const Status refused =
      exponential->find_all(text + "cb", Deadline::after_ms(60'000), scratch, spans);
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(refused.message(), HasSubstr("limit"));
  // Quadratic search over many positions.
  const auto quadratic = SplitPattern::compile(R"(\s+$)");
  ASSERT_TRUE(quadratic.ok());
  const Status late =
      quadratic->find_all(std::string(4 << 20, ' ') + "x", Deadline::after_ms(100), scratch, spans);
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded);
}

TEST(SplitPattern, FindsMatchesFarFromTheStart) {
  const std::string gap(100'000, 'x');
  EXPECT_THAT(matches("é", gap + "é" + gap + "é"), ElementsAre("é", "é"));
}

}  // namespace
}  // namespace spindle::text
