// No template and no conversation can make the interpreter hang, crash or fill the memory.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "cluster/text/chat_template.h"
#include "tests/cluster/text/jinja/render_text.h"

namespace spindle::text::jinja {
namespace {

using testing::HasSubstr;

StatusCode code_of(const std::string& source, const RenderOptions& options = {}) {
  const auto parsed = ChatTemplate::parse(source);
  if (!parsed.ok()) return parsed.status().code();
  return parsed->render({}, options).status().code();
}

std::string repeat(std::string_view text, int n) {
  std::string repeated;
  for (int i = 0; i < n; ++i) repeated += text;
  return repeated;
}

TEST(Bounds, Steps) {
  RenderOptions few;
  few.limits.max_steps = 1000;
  EXPECT_EQ(
      code_of("{% for i in range(100) %}{% for j in range(100) %}{% endfor %}{% endfor %}", few),
      StatusCode::kTooLarge);
  EXPECT_THAT(render_text("{% for i in range(2000) %}{% endfor %}", {}, few),
              HasSubstr("more than 1000 steps"));
}

// Sanitizers make the same steps slower.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::chrono::seconds kHostileLimit{600};
#else
constexpr std::chrono::seconds kHostileLimit{60};
#endif

// With the default limits: each would run for hours or need terabytes.
TEST(Bounds, HostileTemplatesEndSoon) {
  const auto start = std::chrono::steady_clock::now();
  const std::string loops = repeat("{% for i in range(99999) %}", 8);
  for (
      const std::string& source : std::vector<std::string>{
          loops + repeat("{% endfor %}", 8),
          "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
          "{% endfor %}",
          "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
          "{% endfor %}",
          "{{ 'a' * 9223372036854775807 }}",
          "{{ [1] * 9223372036854775807 }}",
          "{{ ('ab' * 9000000).replace('a', 'x' * 100000) }}",
          "{{ ('a' * 9000000).replace('', 'x' * 100000) }}",
          "{{ ('\\n' * 9000000) | indent(1000, true, true) }}",
          "{{ ('a,' * 90000000).split(',') | length }}",
          "{{ ('a ' * 90000000).split() | length }}",
          "{{ ('\\n' * 90000000).splitlines() | length }}",
          "{{ ('a' * 90000000)[::-1] | length }}",
          "{{ ('a' * 90000000) | list | length }}",
          // Shared structure: small in memory, exponential to print or compare.
          "{% set ns = namespace(x=[]) %}{% for i in range(80) %}{% set ns.x = [ns.x, ns.x] %}"
          "{% endfor %}{{ ns.x }}",
          "{% set ns = namespace(x=[]) %}{% for i in range(80) %}{% set ns.x = [ns.x, ns.x] %}"
          "{% endfor %}{{ ns.x | tojson }}",
          "{% set a = namespace(x=[]) %}{% set b = namespace(x=[]) %}{% for i in range(80) %}"
          "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
          // Cycles through the one kind of value that can change.
          "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns }}",
          "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
          "{% macro f(n) %}{{ n }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
          "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxx' }}"
          "{% endfor %}{% endfor %}",
          "{{ [[[1]]] | map('map', 'map', 'map', 'list') | list }}{{ 'a' | nothing }}",
          // Cheap steps over long texts.
          "{% set s = 'a' * 100000000 %}{% for i in range(99999) %}{% if s.startswith(s) and s == s"
          " and s in [s] and s <= s %}{% endif %}{% endfor %}",
          "{% for i in range(99999) %}{{ ('a' * 1000000).rfind('b' ~ 'a' * 500000) }}{% endfor %}",
          "{% for i in range(99999) %}{{ ('a' * 1000000).rsplit('a' * 500000 ~ 'b') }}{% endfor %}",
          "{% for i in range(99999) %}{{ ('a' * 1000000).strip('bcdefgh' * 100000 ~ 'a') }}"
          "{% endfor %}",
          "{% set s = 'é' * 1000000 %}{% for i in range(99999) %}{{ s is upper }}{{ s | int }}"
          "{{ s | length }}{{ s | wordcount }}{% endfor %}",
          "{{ range(99999) | list | unique | list | length }}",
          "{{ range(99999) | map('string') | sort | list == range(99999) | sort }}"
          "{{ 1 + 'a' }}",
      }) {
    const StatusCode code = code_of(source);
    EXPECT_TRUE(code == StatusCode::kTooLarge || code == StatusCode::kInvalidArgument)
        << status_code_name(code) << " for " << source.substr(0, 200);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, kHostileLimit);
}

TEST(Bounds, MessagesAreShort) {
  const std::string message = render_text("{{ raise_exception('é' * 1000000) }}");
  EXPECT_LT(message.size(), 2100u);
  EXPECT_TRUE(message.ends_with("é"));
}

TEST(Bounds, Output) {
  RenderOptions small;
  small.limits.max_output_bytes = 100;
  EXPECT_EQ(code_of("{% for i in range(50) %}abc{% endfor %}", small), StatusCode::kTooLarge);
  EXPECT_EQ(code_of("{% for i in range(30) %}abc{% endfor %}", small), StatusCode::kOk);
}

TEST(Bounds, Nesting) {
  // By the parser, for what is written.
  for (const auto& [open, close] :
       std::vector<std::pair<std::string, std::string>>{{"(", ")"},
                                                        {"[", "]"},
                                                        {"{1:", "}"},
                                                        {"not ", ""},
                                                        {"-", ""},
                                                        {"x if y else ", ""},
                                                        {"x[", "]"},
                                                        {"f(", ")"}}) {
    for (const int n : {500, 20'000}) {
      EXPECT_EQ(code_of("{{ " + repeat(open, n) + "1" + repeat(close, n) + " }}"),
                StatusCode::kInvalidArgument)
          << open;
    }
  }
  // Left-deep chains need no recursion to parse.
  for (const std::string link : {"+1", ".a", "|trim", "[0]", "()", " and 1", " is odd", "**2"}) {
    EXPECT_EQ(code_of("{{ x" + repeat(link, 20'000) + " }}"), StatusCode::kInvalidArgument) << link;
  }
  EXPECT_EQ(code_of(repeat("{% if 1 %}", 20'000) + repeat("{% endif %}", 20'000)),
            StatusCode::kInvalidArgument);
  // What people write is far inside the limits.
  EXPECT_EQ(code_of("{{ 1" + repeat("+1", 100) + " }}"), StatusCode::kOk);
  EXPECT_EQ(code_of("{{ 1" + repeat("~1", 10'000) + " }}"), StatusCode::kOk);
  EXPECT_EQ(code_of("{{ [1" + repeat(",1", 10'000) + "] }}"), StatusCode::kOk);
  EXPECT_EQ(code_of(repeat("{% if 1 %}", 50) + repeat("{% endif %}", 50)), StatusCode::kOk);
}

TEST(Bounds, DeepContext) {
  boost::json::value deep = 1;
  for (int i = 0; i < 2000; ++i) deep = boost::json::array{std::move(deep)};
  EXPECT_THAT(render_text("x", {{"deep", deep}}), HasSubstr("nested deeper"));
}

TEST(Bounds, SourceSize) {
  const auto parsed = ChatTemplate::parse(std::string(ChatTemplate::kMaxSourceBytes + 1, 'a'));
  EXPECT_EQ(parsed.status().code(), StatusCode::kTooLarge);
}

// Random edits of a template that uses everything.
TEST(Bounds, MutatedTemplatesAreHarmless) {
  const std::string whole =
      "{%- set ns = namespace(n=0, s='') %}{% macro m(a, b=[1,2]) %}{{ a | tojson(indent=2) }}"
      "{{ b[::-1] }}{% endmacro %}{% for k, v in messages[0].items() if v is string %}"
      "{% set ns.n = ns.n + loop.index * 2 ** 3 // 1 %}{{ m(v, b=k.split('e', 1)) ~ ns.n }}"
      "{% if not loop.last and 'a' in v or k == \"role\" %}{{- v | trim | replace('a', 'bb') -}}"
      "{% elif loop.first %}{% continue %}{% else %}{% break %}{% endif %}{% endfor %}"
      "{% call m('x') %}y{% endcall %}{% raw %}{{{% endraw %}{# c #}{% set z %}q{% endset %}{{ z "
      "}}";
  const boost::json::object context = {
      {"messages", boost::json::array{{{"role", "user"}, {"content", "banana é🙂"}, {"n", 3}}}}};
  RenderOptions options;
  options.limits.max_steps = 200'000;
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  int n_rendered = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string source = whole;
    for (std::size_t n = 1 + random() % 4; n > 0; --n) {
      const std::size_t at = random() % source.size();
      constexpr std::string_view kBytes = "{}%#-+*/|~.,:()[]'\"\\ \n019ax=<>!_";
      switch (random() % 4) {
        case 0:
          source[at] = kBytes[random() % kBytes.size()];
          break;
        case 1:
          source.erase(at, 1 + random() % 10);
          break;
        case 2:
          source.insert(at, 1, kBytes[random() % kBytes.size()]);
          break;
        default:
          source.insert(at, source.substr(random() % source.size(), random() % 30));
      }
      if (source.empty()) source = "x";
    }
    const auto parsed = ChatTemplate::parse(source);
    if (parsed.ok()) n_rendered += parsed->render(context, options).ok();
  }
  EXPECT_GT(n_rendered, 0);
}

}  // namespace
}  // namespace spindle::text::jinja
