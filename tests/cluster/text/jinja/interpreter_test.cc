// The language, checked by eye. The comparison with Jinja2 itself (tests/npm/oracles) covers the
// same ground and much more; these cases need nothing installed.

#include "cluster/text/jinja/interpreter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/cluster/text/jinja/render_text.h"

namespace spindle::text::jinja {
namespace {

using testing::HasSubstr;

std::string value_of(const std::string& expression, const boost::json::object& context = {}) {
  return render_text("{{ " + expression + " }}", context);
}

TEST(Interpreter, ValuesPrintAsInPython) {
  EXPECT_EQ(value_of("[none, true, 1, 1.0, 'it\\'s', \"q\", {'k': ()}, (1,)]"),
            "[None, True, 1, 1.0, \"it's\", 'q', {'k': ()}, (1,)]");
  EXPECT_EQ(value_of("1e16 ~ ' ' ~ 1e15 ~ ' ' ~ 1e-5 ~ ' ' ~ 0.1 ~ ' ' ~ 1e22"),
            "1e+16 1000000000000000.0 1e-05 0.1 1e+22");
  EXPECT_EQ(value_of("missing"), "");
  EXPECT_EQ(value_of("['\\x00', '\\u200b', '\\n']"), "['\\x00', '\\u200b', '\\n']");
}

TEST(Interpreter, Arithmetic) {
  EXPECT_EQ(value_of("1 + 2 * 3, 7 // 2, -7 // 2, -7 % 3, 7 / 2, 2 ** 10, 'ab' * 2"),
            "(7, 3, -4, 2, 3.5, 1024, 'abab')");
  EXPECT_EQ(value_of("1 == 1.0, true + 1, 'a' ~ 1 ~ none, [1] + [2], 1 < 2 < 3"),
            "(True, 2, 'a1None', [1, 2], True)");
  EXPECT_THAT(value_of("1 + 'a'"), HasSubstr("unsupported operand types for +: 'int' and 'str'"));
  EXPECT_THAT(value_of("1 / 0"), HasSubstr("division by zero"));
  EXPECT_THAT(value_of("9223372036854775807 + 1"), HasSubstr("64 bits"));
  EXPECT_THAT(value_of("(-9223372036854775807 - 1) // -1"), HasSubstr("64 bits"));
  EXPECT_EQ(value_of("(-9223372036854775807 - 1) % -1"), "0");
  EXPECT_THAT(value_of("-(-9223372036854775807 - 1)"), HasSubstr("64 bits"));
}

TEST(Interpreter, SubscriptsAndSlices) {
  EXPECT_EQ(value_of("[1,2,3][-1], [1,2,3,4][1:3], [1,2,3][::-1], 'añb'[1], 'añb'[::-1]"),
            "(3, [2, 3], [3, 2, 1], 'ñ', 'bña')");
  EXPECT_EQ(value_of("{'a': {'b': 2}}.a.b, {'a': 1}['z'] is defined, [1][5] is defined"),
            "(2, False, False)");
  EXPECT_EQ(value_of("[1,2,3][9223372036854775807:], [1,2][::9223372036854775807]"), "([], [1])");
}

TEST(Interpreter, UndefinedIsNamed) {
  EXPECT_THAT(value_of("user.name"), HasSubstr("'user' is undefined"));
  EXPECT_THAT(value_of("{'a': 1}.b.c"), HasSubstr("'dict object' has no attribute 'b'"));
  EXPECT_THAT(value_of("[1][3].x"), HasSubstr("'list' has no element 3"));
  EXPECT_THAT(value_of("missing + 1"), HasSubstr("'missing' is undefined"));
  EXPECT_EQ(value_of("missing is defined, missing == other, missing ~ 'x'"), "(False, True, 'x')");
}

TEST(Interpreter, ErrorsNameThePlace) {
  EXPECT_THAT(render_text("ab\ncé {{ 1 + x.y }}"), HasSubstr("line 2, column 12"));
  EXPECT_THAT(render_text("{{ raise_exception('no good') }}"), HasSubstr("column 4: no good"));
  EXPECT_THAT(render_text("{% if true %}"), HasSubstr("the template ends before 'endif'"));
  EXPECT_THAT(render_text("{% include 'x' %}"), HasSubstr("'include' is not supported"));
  EXPECT_THAT(render_text("{% nonsense %}"), HasSubstr("unknown tag 'nonsense'"));
  EXPECT_THAT(value_of("1 | nonsense"), HasSubstr("no filter named 'nonsense'"));
  EXPECT_THAT(value_of("1 is nonsense"), HasSubstr("no test named 'nonsense'"));
}

TEST(Interpreter, Loops) {
  EXPECT_EQ(render_text("{% for i in [3,4,5] if i != 4 %}{{ loop.index }}/{{ loop.length }}={{ i }}"
                        "{{ ',' if not loop.last }}{% else %}none{% endfor %}"),
            "1/2=3,2/2=5");
  EXPECT_EQ(render_text("{% for i in [] %}x{% else %}none{% endfor %}"), "none");
  EXPECT_EQ(render_text("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"), "a1");
  EXPECT_EQ(render_text("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
                        "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
            "023");
  EXPECT_EQ(render_text("{% for c in 'ab' %}{{ loop.previtem }}[{{ c }}]{{ loop.nextitem }} "
                        "{% endfor %}"),
            "[a]b a[b] ");
}

TEST(Interpreter, ScopesOfAssignments) {
  EXPECT_EQ(
      render_text("{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{{ x }}{% endfor %}{{ x }}"),
      "21");
  EXPECT_EQ(render_text("{% if true %}{% set x = 2 %}{% endif %}{{ x }}"), "2");
  EXPECT_EQ(render_text("{% set ns = namespace(n=0) %}{% for i in [1,2] %}"
                        "{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"),
            "3");
  EXPECT_THAT(render_text("{% set d = {} %}{% set d.a = 1 %}"), HasSubstr("not a namespace"));
  EXPECT_EQ(render_text("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x is string }}"), "a1True");
}

TEST(Interpreter, Macros) {
  EXPECT_EQ(render_text("{% macro m(a, b='B') %}<{{ a }}{{ b }}>{% endmacro %}"
                        "{{ m(1) }}{{ m(1, 2) }}{{ m(b=3, a=4) }}{{ m() }}"),
            "<1B><12><43><B>");
  EXPECT_EQ(render_text("{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}"
                        "{{ f(3) }}"),
            "3210");
  EXPECT_EQ(render_text("{% macro m() %}({{ caller('x') }}){% endmacro %}"
                        "{% call(y) m() %}in {{ y }}{% endcall %}"),
            "(in x)");
  EXPECT_THAT(render_text("{% macro m() %}{% endmacro %}{{ m(1) }}"), HasSubstr("not more than 0"));
}

TEST(Interpreter, FiltersAndTests) {
  EXPECT_EQ(value_of("[{'r': 'u'}, {'r': 'a'}] | selectattr('r', 'equalto', 'u') | list | length"),
            "1");
  EXPECT_EQ(value_of("[3, 1, 2] | sort | map('string') | join(', ')"), "1, 2, 3");
  EXPECT_EQ(value_of("{'b': 1, 'A': 2} | dictsort, 'x' | default('d'), y | d('d')"),
            "([('A', 2), ('b', 1)], 'x', 'd')");
  EXPECT_EQ(value_of("2.5 | round, -5 | abs, '42.9' | int, 'x' | int(7), [1, 2] | sum"),
            "(2.0, 5, 42, 7, 3)");
  EXPECT_EQ(value_of("1 is odd, {} is mapping, [] is sequence, 'a' is string, true is number"),
            "(True, True, True, True, True)");
  EXPECT_THAT(value_of("[1, 'a'] | sort"), HasSubstr("have no order"));
  EXPECT_THAT(value_of("'a' | trim(bogus=1)"), HasSubstr("no argument 'bogus'"));
  EXPECT_THAT(value_of("[1].append(2)"), HasSubstr("'append'"));
}

TEST(Interpreter, JsonAsTransformersWritesIt) {
  const boost::json::object context = {
      {"v", {{"z", {1, 2.0, nullptr, true}}, {"a", "é\"</b>\n"}, {"e", boost::json::object()}}}};
  EXPECT_EQ(value_of("v | tojson", context),
            R"({"z": [1, 2.0, null, true], "a": "é\"</b>\n", "e": {}})");
  EXPECT_EQ(value_of("{'a': [1, {'b': []}]} | tojson(indent=2)"),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ]\n}");
  EXPECT_EQ(value_of("{'b': '🙂', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true)"),
            R"({"a": 1, "b": "\ud83d\ude42"})");
  EXPECT_THAT(value_of("missing | tojson"), HasSubstr("not JSON serializable"));
}

TEST(Interpreter, ContextNumbers) {
  EXPECT_EQ(value_of("n", {{"n", std::uint64_t{5}}}), "5");
  EXPECT_THAT(value_of("n", {{"n", std::uint64_t{1} << 63}}), HasSubstr("64 bits"));
}

TEST(Interpreter, ContextStringsMustBeUtf8) {
  EXPECT_THAT(value_of("s[1]", {{"s", "ab\xC3"}}), HasSubstr("not valid UTF-8 at byte 2"));
  EXPECT_THAT(value_of("1", {{"d", {{"k\xFF", 1}}}}), HasSubstr("not valid UTF-8 at byte 1"));
}

TEST(Interpreter, TheClockCanBeGiven) {
  RenderOptions options;
  options.now = 1'700'000'000;  // 14 November 2023, wherever one is
  EXPECT_THAT(render_text("{{ strftime_now('%b %Y') }}", {}, options), "Nov 2023");
  EXPECT_THAT(render_text("{{ strftime_now('%2000d') }}", {}, options), HasSubstr("too long"));
}

}  // namespace
}  // namespace spindle::text::jinja
