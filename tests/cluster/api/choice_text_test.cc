#include "cluster/api/choice_text.h"
#include "tests/source_dir.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace spindle::api {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class ChoiceTextTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto loaded = text::Tokenizer::load(source_dir() + "/models/spindle-mini");
    ASSERT_TRUE(loaded.ok()) << loaded.status().to_string();
    tokenizer_ = std::move(*loaded);
  }

  ChoiceText choice(ChoiceOptions options) {
    std::optional<text::StopStringMatcher> matcher;
    if (!options.stop.empty()) {
      matcher = *text::StopStringMatcher::create(options.stop, options.include_stop);
    }
    return {*tokenizer_, std::move(options), std::move(matcher)};
  }
  std::vector<std::int32_t> ids(const std::string& text) { return *tokenizer_->encode(text); }

  struct Run {
    std::vector<std::string> texts;  // of each push
    OutputDelta all;
    std::size_t n_pushed = 0;
    bool told_engine = false;
  };
  // Pushes tokens until the choice finishes; the last token has finish `last`.
  Run run(ChoiceText& choice, const std::vector<std::int32_t>& tokens, engine::FinishReason last) {
    Run result;
    for (std::size_t i = 0; i < tokens.size() && !choice.finished(); ++i) {
      engine::TokenEvent event;
      event.token = tokens[i];
      event.logprob = -static_cast<float>(i);
      if (i + 1 == tokens.size()) event.finish = last;
      OutputDelta delta;
      result.told_engine |= choice.push(event, delta);
      result.texts.push_back(delta.text);
      ++result.n_pushed;
      result.all.text += delta.text;
      result.all.finish = delta.finish;
      result.all.stop_reason = delta.stop_reason;
      for (const std::int32_t id : delta.token_ids) result.all.token_ids.push_back(id);
      for (const auto& info : delta.logprobs) result.all.logprobs.push_back(info);
    }
    return result;
  }

  std::unique_ptr<text::Tokenizer> tokenizer_;
};

TEST_F(ChoiceTextTest, GivesTextAndIdsAsTheyCome) {
  ChoiceText choice = this->choice({.stop = {}, .stop_token_ids = {}});
  const auto tokens = ids(" one two");
  const Run result = run(choice, tokens, engine::FinishReason::kLength);
  EXPECT_EQ(result.all.text, " one two");
  EXPECT_EQ(result.all.token_ids, tokens);
  EXPECT_EQ(result.all.finish, engine::FinishReason::kLength);
  EXPECT_THAT(result.all.logprobs, IsEmpty());
}

TEST_F(ChoiceTextTest, HoldsBackPartialCharacters) {
  ChoiceText choice = this->choice({.stop = {}, .stop_token_ids = {}});
  const auto tokens = ids("\xF0\x9F\x98\x80");  // one character of several tokens
  ASSERT_GT(tokens.size(), 1u);
  const Run result = run(choice, tokens, engine::FinishReason::kLength);
  EXPECT_EQ(result.texts.front(), "");
  EXPECT_EQ(result.all.text, "\xF0\x9F\x98\x80");
  EXPECT_EQ(result.all.token_ids, tokens);
}

TEST_F(ChoiceTextTest, ReplacesACharacterThatNeverEnds) {
  ChoiceText choice = this->choice({.stop = {}, .stop_token_ids = {}});
  auto tokens = ids("\xF0\x9F\x98\x80");
  tokens.pop_back();
  const Run result = run(choice, tokens, engine::FinishReason::kLength);
  EXPECT_EQ(result.all.text, "\xEF\xBF\xBD");
}

TEST_F(ChoiceTextTest, HoldsBackWhatMayBecomeAStopString) {
  ChoiceText choice =
      this->choice({.logprobs = true, .stop = {" two three"}, .stop_token_ids = {}});
  const auto tokens = ids(" one two four");
  const Run result = run(choice, tokens, engine::FinishReason::kLength);
  EXPECT_EQ(result.texts.at(1), "");  // " two" waits
  EXPECT_EQ(result.all.text, " one two four");
  EXPECT_EQ(result.all.token_ids, tokens);
  ASSERT_EQ(result.all.logprobs.size(), tokens.size());
  EXPECT_EQ(result.all.logprobs[1].chosen.bytes, " two");
  EXPECT_EQ(result.all.logprobs[1].chosen.logprob, -1.0F);
}

TEST_F(ChoiceTextTest, CutsAtAStopStringAndTellsTheEngine) {
  ChoiceText choice =
      this->choice({.logprobs = true, .stop = {"zzz", "wo th"}, .stop_token_ids = {}});
  const auto tokens = ids(" one two three four");
  const Run result = run(choice, tokens, engine::FinishReason::kLength);
  EXPECT_TRUE(result.told_engine);
  EXPECT_LT(result.n_pushed, tokens.size());
  EXPECT_EQ(result.all.text, " one t");
  EXPECT_EQ(result.all.finish, engine::FinishReason::kStop);
  EXPECT_EQ(result.all.stop_reason, "wo th");
  // The token that the cut goes through is given, the one behind it is not.
  EXPECT_EQ(result.all.token_ids.size(), ids(" one two").size());
  EXPECT_EQ(result.all.logprobs.size(), result.all.token_ids.size());
}

TEST_F(ChoiceTextTest, KeepsTheStopStringWhenAsked) {
  ChoiceText choice = this->choice({.stop = {" two"}, .include_stop = true, .stop_token_ids = {}});
  const Run result = run(choice, ids(" one two three"), engine::FinishReason::kLength);
  EXPECT_EQ(result.all.text, " one two");
  EXPECT_EQ(result.all.finish, engine::FinishReason::kStop);
}

TEST_F(ChoiceTextTest, DoesNotTellTheEngineWhatItKnows) {
  ChoiceText choice = this->choice({.stop = {" two"}, .stop_token_ids = {}});
  const Run result = run(choice, ids(" one two"), engine::FinishReason::kLength);
  EXPECT_FALSE(result.told_engine);
  EXPECT_EQ(result.all.finish, engine::FinishReason::kStop);
}

TEST_F(ChoiceTextTest, IgnoresStopStringsBeforeMinTokens) {
  ChoiceText choice = this->choice({.min_tokens = 3, .stop = {" one"}, .stop_token_ids = {}});
  const Run result = run(choice, ids(" one two three one four"), engine::FinishReason::kLength);
  EXPECT_EQ(result.all.text, " one two three");
}

TEST_F(ChoiceTextTest, LeavesTheStopTokenOut) {
  ChoiceText choice = this->choice({.stop = {}, .stop_token_ids = {7}});
  OutputDelta delta;
  engine::TokenEvent event;
  event.token = 7;
  event.is_stop_token = true;
  event.finish = engine::FinishReason::kStop;
  choice.push(event, delta);
  EXPECT_EQ(delta.text, "");
  EXPECT_THAT(delta.token_ids, IsEmpty());
  EXPECT_EQ(delta.stop_reason, "7");
  EXPECT_TRUE(delta.stopped_by_token);
  EXPECT_EQ(choice.generated_tokens(), 1);
}

TEST_F(ChoiceTextTest, GivesNothingAfterItsEnd) {
  ChoiceText choice = this->choice({.stop = {" one"}, .stop_token_ids = {}});
  run(choice, ids(" one"), engine::FinishReason::kNone);
  ASSERT_TRUE(choice.finished());
  OutputDelta delta;
  engine::TokenEvent event;
  event.token = ids(" two").front();
  EXPECT_FALSE(choice.push(event, delta));
  EXPECT_EQ(delta.text, "");
  EXPECT_EQ(delta.finish, engine::FinishReason::kNone);
}

TEST_F(ChoiceTextTest, ShowsSpecialTokensWhenAsked) {
  for (const bool skip : {true, false}) {
    ChoiceText choice =
        this->choice({.skip_special_tokens = skip, .stop = {}, .stop_token_ids = {}});
    const Run result = run(choice, {1, ids(" one").front()}, engine::FinishReason::kLength);
    EXPECT_EQ(result.all.text, skip ? " one" : "<|im_start|> one");
    EXPECT_EQ(result.all.token_ids.size(), 2u);
  }
}

}  // namespace
}  // namespace spindle::api
