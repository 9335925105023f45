#include "cluster/text/stop_strings.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>

namespace spindle::text {
namespace {

StopStringMatcher matcher(std::vector<std::string> stop_strings, bool include = false) {
  auto created = StopStringMatcher::create(std::move(stop_strings), include);
  EXPECT_TRUE(created.ok()) << created.status().to_string();
  return *std::move(created);
}

TEST(StopStrings, HoldsBackWhatMayBecomeOne) {
  auto stops = matcher({"STOP"});
  EXPECT_EQ(stops.push("abcS").emit, "abc");
  EXPECT_EQ(stops.push("T").emit, "");
  EXPECT_EQ(stops.push("STO").emit, "ST");
  EXPECT_EQ(stops.finish(), "STO");
}

TEST(StopStrings, EmitsUpToTheMatchAndNothingAfter) {
  auto stops = matcher({"STOP", "END"});
  const auto first = stops.push("abcST");
  EXPECT_EQ(first.emit, "abc");
  EXPECT_EQ(first.matched, std::nullopt);
  const auto second = stops.push("OPdef");
  EXPECT_EQ(second.emit, "");
  EXPECT_EQ(second.matched, 0u);
  EXPECT_EQ(stops.push("more").emit, "");
  EXPECT_EQ(stops.push("more").matched, 0u);
  EXPECT_EQ(stops.finish(), "");
}

TEST(StopStrings, CanIncludeTheStopString) {
  auto stops = matcher({"STOP"}, true);
  EXPECT_EQ(stops.push("abST").emit, "ab");
  EXPECT_EQ(stops.push("OPx").emit, "STOP");
}

TEST(StopStrings, EarliestEndThenLongest) {
  auto earliest = matcher({"abcd", "bc"});
  EXPECT_EQ(earliest.push("xabcd").matched, 1u);  // "bc" ends first
  auto longest = matcher({"c", "bc", "xbc"});
  const auto output = longest.push("abc");
  EXPECT_EQ(output.matched, 1u);
  EXPECT_EQ(output.emit, "a");
  auto repeated = matcher({"ab", "ab"});
  EXPECT_EQ(repeated.push("ab").matched, 0u);
}

TEST(StopStrings, NoneEmitsEverythingAtOnce) {
  auto stops = matcher({});
  EXPECT_EQ(stops.push("abc").emit, "abc");
  EXPECT_EQ(stops.finish(), "");
}

TEST(StopStrings, KeepsCharactersWhole) {
  auto stops = matcher({"é!"});
  EXPECT_EQ(stops.push("aé").emit, "a");
  EXPECT_EQ(stops.push("è").emit, "éè");  // shares its first byte with "é"
}

TEST(StopStrings, RefusesEmptyAndTooMany) {
  EXPECT_FALSE(StopStringMatcher::create({"a", ""}, false).ok());
  EXPECT_FALSE(StopStringMatcher::create(std::vector<std::string>(257, "a"), false).ok());
  EXPECT_FALSE(StopStringMatcher::create({std::string(100'000, 'a')}, false).ok());
}

struct Naive {
  std::string emitted;
  std::optional<std::size_t> matched;
};

Naive match_naively(const std::vector<std::string>& stops, const std::string& text, bool include) {
  for (std::size_t end = 1; end <= text.size(); ++end) {
    std::optional<std::size_t> best;
    for (std::size_t s = 0; s < stops.size(); ++s) {
      const bool ends_here = std::string_view(text).substr(0, end).ends_with(stops[s]);
      if (ends_here && (!best || stops[s].size() > stops[*best].size())) best = s;
    }
    if (best) return {text.substr(0, include ? end : end - stops[*best].size()), best};
  }
  return {text, std::nullopt};
}

TEST(StopStrings, AgreesWithNaiveSearch) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto random_string = [&random](std::size_t max_bytes) {
    std::string text;
    for (std::size_t n = 1 + random() % max_bytes; n > 0; --n) text += "ab"[random() % 2];
    return text;
  };
  for (int i = 0; i < 2000; ++i) {
    std::vector<std::string> stops;
    for (std::size_t n = 1 + random() % 3; n > 0; --n) stops.push_back(random_string(7));
    const std::string text = random_string(30);
    const bool include = random() % 2 == 0;
    const Naive expected = match_naively(stops, text, include);
    auto stream = matcher(stops, include);
    std::string emitted;
    std::optional<std::size_t> matched;
    for (std::size_t at = 0; at < text.size() && !matched;) {
      const std::size_t n = 1 + random() % 4;
      const auto output = stream.push(std::string_view(text).substr(at, n));
      emitted += output.emit;
      matched = output.matched;
      at += n;
    }
    if (!matched) emitted += stream.finish();
    EXPECT_EQ(emitted, expected.emitted) << text;
    EXPECT_EQ(matched, expected.matched) << text;
  }
}

TEST(StopStrings, TakesLinearTime) {
  // Each pushed character leaves a long held text: rescanning it would take 10^10 steps.
  auto stops = matcher({std::string(20'000, 'a') + "b"});
  const auto start = std::chrono::steady_clock::now();
  std::size_t n_emitted = 0;
  for (int i = 0; i < 500'000; ++i) n_emitted += stops.push("a").emit.size();
  EXPECT_EQ(n_emitted, 480'000u);
  EXPECT_EQ(stops.finish().size(), 20'000u);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

}  // namespace
}  // namespace spindle::text
