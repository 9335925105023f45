#include "cluster/text/aho_corasick.h"

#include <gtest/gtest.h>

#include <random>

namespace spindle::text {
namespace {

struct Found {
  std::size_t begin;
  std::size_t end;
  std::uint32_t pattern;
  bool operator==(const Found&) const = default;
};

std::vector<Found> find_all(const std::vector<std::string>& patterns, std::string_view text) {
  const AhoCorasick automaton(patterns);
  std::vector<Found> found;
  std::size_t from = 0;
  while (const auto match = automaton.find_leftmost_longest(text, from)) {
    found.push_back({match->begin, match->end, match->pattern});
    from = match->end;
  }
  return found;
}

std::vector<Found> find_all_naively(const std::vector<std::string>& patterns,
                                    std::string_view text) {
  std::vector<Found> found;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t longest = 0;
    std::uint32_t which = 0;
    for (std::size_t p = 0; p < patterns.size(); ++p) {
      if (patterns[p].size() > longest && text.substr(at).starts_with(patterns[p])) {
        longest = patterns[p].size();
        which = static_cast<std::uint32_t>(p);
      }
    }
    if (longest > 0) found.push_back({at, at + longest, which});
    at += std::max<std::size_t>(longest, 1);
  }
  return found;
}

TEST(AhoCorasick, LeftmostThenLongest) {
  EXPECT_EQ(find_all({"bc", "abcd"}, "xabcd"), (std::vector<Found>{{1, 5, 1}}));
  EXPECT_EQ(find_all({"bc", "abcd"}, "xabce"), (std::vector<Found>{{2, 4, 0}}));
  EXPECT_EQ(find_all({"a", "ab"}, "aab"), (std::vector<Found>{{0, 1, 0}, {1, 3, 1}}));
  EXPECT_EQ(find_all({"x"}, ""), (std::vector<Found>{}));
  EXPECT_EQ(find_all({}, "abc"), (std::vector<Found>{}));
  EXPECT_EQ(find_all({"ab", "ab"}, "ab"), (std::vector<Found>{{0, 2, 0}}));
}

TEST(AhoCorasick, AgreesWithNaiveSearch) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto random_string = [&random](std::size_t max_bytes) {
    std::string text;
    for (std::size_t n = 1 + random() % max_bytes; n > 0; --n) text += "ab\xFF"[random() % 3];
    return text;
  };
  for (int i = 0; i < 500; ++i) {
    std::vector<std::string> patterns;
    for (std::size_t n = 1 + random() % 5; n > 0; --n) patterns.push_back(random_string(5));
    const std::string text = random_string(40);
    EXPECT_EQ(find_all(patterns, text), find_all_naively(patterns, text)) << text;
  }
}

}  // namespace
}  // namespace spindle::text
