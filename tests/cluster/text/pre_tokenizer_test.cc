#include "cluster/text/pre_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace spindle::text {
namespace {

using testing::ElementsAre;
using Words = std::vector<std::string>;

Words split_words(const PreTokenizer& pre_tokenizer, std::string_view text) {
  Words words;
  PatternScratch scratch;
  const Status status = pre_tokenizer.split(text, Deadline::after_ms(10'000), scratch,
                                            [&words](std::string_view word) {
                                              words.emplace_back(word);
                                              return ok_status();
                                            });
  EXPECT_TRUE(status.ok()) << status.to_string();
  return words;
}

Words split_dashes(SplitBehavior behavior, bool invert = false) {
  std::vector<SplitStep> steps;
  steps.push_back({*SplitPattern::compile_literal("-"), behavior, invert});
  return split_words(PreTokenizer(std::move(steps), false, std::nullopt), "-a--bc-");
}

// The example that the tokenizers library documents its behaviours with, and its inversion.
TEST(PreTokenizer, Behaviors) {
  EXPECT_THAT(split_dashes(SplitBehavior::kIsolated), ElementsAre("-", "a", "-", "-", "bc", "-"));
  EXPECT_THAT(split_dashes(SplitBehavior::kRemoved), ElementsAre("a", "bc"));
  EXPECT_THAT(split_dashes(SplitBehavior::kMergedWithPrevious), ElementsAre("-", "a-", "-", "bc-"));
  EXPECT_THAT(split_dashes(SplitBehavior::kMergedWithNext), ElementsAre("-a", "-", "-bc", "-"));
  EXPECT_THAT(split_dashes(SplitBehavior::kContiguous), ElementsAre("-", "a", "--", "bc", "-"));
  EXPECT_THAT(split_dashes(SplitBehavior::kRemoved, true), ElementsAre("-", "-", "-", "-"));
  EXPECT_THAT(split_dashes(SplitBehavior::kMergedWithPrevious, true),
              ElementsAre("-a", "-", "-bc", "-"));
}

TEST(PreTokenizer, ByteLevelPattern) {
  const PreTokenizer plain({}, false, *SplitPattern::compile(byte_level_pattern()));
  EXPECT_THAT(split_words(plain, "Hello there's 123  x!"),
              ElementsAre("Hello", " there", "'s", " 123", " ", " x", "!"));
  const PreTokenizer prefixed({}, true, *SplitPattern::compile(byte_level_pattern()));
  EXPECT_THAT(split_words(prefixed, "Hello"), ElementsAre(" Hello"));
  EXPECT_THAT(split_words(prefixed, " Hello"), ElementsAre(" Hello"));
  EXPECT_THAT(split_words(prefixed, ""), ElementsAre());
}

TEST(PreTokenizer, PrefixSpaceGoesToEveryPiece) {
  std::vector<SplitStep> steps;
  steps.push_back({*SplitPattern::compile("[0-9]"), SplitBehavior::kIsolated, false});
  const PreTokenizer pre_tokenizer(std::move(steps), true, std::nullopt);
  EXPECT_THAT(split_words(pre_tokenizer, "a1 b"), ElementsAre(" a", " 1", " b"));
}

TEST(PreTokenizer, StepsSplitThePiecesOfTheStepBefore) {
  std::vector<SplitStep> steps;
  steps.push_back({*SplitPattern::compile(R"(\p{N})"), SplitBehavior::kContiguous, false});
  steps.push_back({*SplitPattern::compile("^."), SplitBehavior::kIsolated, false});
  const PreTokenizer pre_tokenizer(std::move(steps), false, std::nullopt);
  EXPECT_THAT(split_words(pre_tokenizer, "ab12c"), ElementsAre("a", "b", "1", "2", "c"));
}

TEST(PreTokenizer, TheSinkCanStop) {
  const PreTokenizer pre_tokenizer({}, false, *SplitPattern::compile(byte_level_pattern()));
  PatternScratch scratch;
  int n_words = 0;
  const Status status = pre_tokenizer.split(
      "a b c", Deadline::after_ms(10'000), scratch,
      [&n_words](std::string_view) { return ++n_words == 2 ? cancelled("enough") : ok_status(); });
  EXPECT_EQ(status.code(), StatusCode::kCancelled);
  EXPECT_EQ(n_words, 2);
}

}  // namespace
}  // namespace spindle::text
