#include "cluster/text/detokenizer.h"

#include <gtest/gtest.h>

#include "tests/cluster/text/golden_data.h"
#include "tests/cluster/text/random_text.h"

namespace spindle::text {
namespace {

class Detokenizer : public testing::Test {
 protected:
  void SetUp() override { tokenizer_ = *Tokenizer::load(bundled_model()); }
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(Detokenizer, HoldsBackPartsOfACharacter) {
  // "日" is three byte tokens in the bundled vocabulary.
  const auto ids = *tokenizer_->encode("日");
  ASSERT_EQ(ids.size(), 3u);
  IncrementalDetokenizer detokenizer(*tokenizer_, true);
  EXPECT_EQ(detokenizer.push(ids[0]), "");
  EXPECT_EQ(detokenizer.push(ids[1]), "");
  EXPECT_EQ(detokenizer.push(ids[2]), "日");
  EXPECT_EQ(detokenizer.finish(), "");
}

TEST_F(Detokenizer, ReplacesWhatNeverCompletes) {
  const auto ids = *tokenizer_->encode("日");
  IncrementalDetokenizer detokenizer(*tokenizer_, true);
  detokenizer.push(ids[0]);
  detokenizer.push(ids[1]);
  EXPECT_EQ(detokenizer.push(*tokenizer_->token_to_id("a")), "\uFFFDa");
  detokenizer.push(ids[0]);
  EXPECT_EQ(detokenizer.finish(), "\uFFFD");
}

TEST_F(Detokenizer, SpecialTokens) {
  IncrementalDetokenizer skipping(*tokenizer_, true);
  EXPECT_EQ(skipping.push(2), "");
  IncrementalDetokenizer showing(*tokenizer_, false);
  EXPECT_EQ(showing.push(2), "<|im_end|>");
  EXPECT_EQ(showing.push(1 << 29), "");
  EXPECT_EQ(showing.push(-1), "");
}

TEST_F(Detokenizer, ConcatenatesToDecode) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int i = 0; i < 300; ++i) {
    std::vector<std::int32_t> ids;
    if (i % 2 == 0) {
      ids = *tokenizer_->encode(random_text(random, 40));
    } else {  // arbitrary ids: mostly broken characters
      for (int n = 0; n < 60; ++n) ids.push_back(static_cast<std::int32_t>(random() % 300));
    }
    const bool skip_special = random() % 2 == 0;
    IncrementalDetokenizer detokenizer(*tokenizer_, skip_special);
    std::string joined;
    for (const std::int32_t id : ids) {
      const std::string piece = detokenizer.push(id);
      EXPECT_EQ(find_invalid_utf8(piece), std::nullopt);
      joined += piece;
    }
    joined += detokenizer.finish();
    EXPECT_EQ(joined, tokenizer_->decode(ids, skip_special));
  }
}

}  // namespace
}  // namespace spindle::text
