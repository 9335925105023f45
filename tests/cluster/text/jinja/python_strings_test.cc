// Expected values are Python's.

#include "cluster/text/jinja/python_strings.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cluster/text/jinja/text_form.h"

namespace spindle::text::jinja {
namespace {

using testing::ElementsAre;

TEST(PythonStrings, Strip) {
  EXPECT_EQ(strip_left(" \t\u00a0\u3000a "), "a ");
  EXPECT_EQ(strip_right("a \x1c\u2003"), "a");
  EXPECT_EQ(strip_left("éxéa", "éx"), "a");
  EXPECT_EQ(strip_right("   "), "");
}

TEST(PythonStrings, Split) {
  EXPECT_THAT(split(" a  b c ", std::nullopt, -1), ElementsAre("a", "b", "c"));
  EXPECT_THAT(split(" a  b c ", std::nullopt, 1), ElementsAre("a", "b c "));
  EXPECT_THAT(split("a,,b", ",", -1), ElementsAre("a", "", "b"));
  EXPECT_THAT(split("", ",", -1), ElementsAre(""));
  EXPECT_THAT(split("", std::nullopt, -1), ElementsAre());
  EXPECT_THAT(split_from_right("a,b,c", ",", 1), ElementsAre("a,b", "c"));
  EXPECT_THAT(split_from_right(" a b ", std::nullopt, 1), ElementsAre(" a", "b"));
  EXPECT_THAT(split_lines("a\r\nb\n\nc", false), ElementsAre("a", "b", "", "c"));
  EXPECT_GE(max_lines("a\r\nb\n\u2028c"), 4u);
}

TEST(PythonStrings, Case) {
  EXPECT_EQ(to_upper("straße é"), "STRASSE É");
  EXPECT_EQ(to_title("they're ünïque 2nd"), "They'Re Ünïque 2Nd");
  EXPECT_EQ(capitalize("éCOLE"), "École");
  EXPECT_TRUE(is_upper("A1"));
  EXPECT_FALSE(is_upper("1"));
}

TEST(PythonStrings, ReplaceAndCount) {
  EXPECT_EQ(replace("aaa", "a", "b", 2), "bba");
  EXPECT_EQ(replace("éa", "", "-", -1), "-é-a-");
  EXPECT_EQ(replace("abc", "", "-", 2), "-a-bc");
  EXPECT_EQ(count_occurrences("aaaa", "aa"), 2);
  EXPECT_EQ(count_occurrences("éa", ""), 3);
}

TEST(PythonStrings, Numbers) {
  EXPECT_EQ(python_parse_float(" 1_0.5e1 "), 105.0);
  EXPECT_EQ(python_parse_float(".5"), 0.5);
  EXPECT_EQ(python_parse_float("1e999"), std::numeric_limits<double>::infinity());
  for (const std::string_view bad : {"", "1_", "_1", "1__0", "0x1p3", "--1", "1e", "é", "1 2"}) {
    EXPECT_EQ(python_parse_float(bad), std::nullopt) << bad;
  }
  EXPECT_EQ(python_parse_integer("-0x1f", 16), -31);
  EXPECT_EQ(python_parse_integer("1_000", 10), 1000);
  EXPECT_EQ(python_parse_integer("99999999999999999999", 10), std::nullopt);
  EXPECT_EQ(python_parse_integer("1.5", 10), std::nullopt);
}

TEST(TextForm, Floats) {
  for (const auto& [value, text] : std::vector<std::pair<double, std::string>>{
           {0.0, "0.0"},
           {-0.0, "-0.0"},
           {1e16, "1e+16"},
           {123456789012345680.0, "1.2345678901234568e+17"},
           {9999999999999998.0, "9999999999999998.0"},
           {0.0001, "0.0001"},
           {0.00001, "1e-05"},
           {5e-324, "5e-324"},
           {-1.5e300, "-1.5e+300"},
           {0.1 + 0.2, "0.30000000000000004"},
       }) {
    EXPECT_EQ(float_text(value), text);
  }
}

}  // namespace
}  // namespace spindle::text::jinja
