#include "cluster/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <thread>

#include "tests/cluster/text/golden_data.h"
#include "tests/cluster/text/random_text.h"
#include "tests/cluster/text/tiny_tokenizer.h"

namespace spindle::text {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Ids = std::vector<std::int32_t>;

std::unique_ptr<Tokenizer> load_bundled() {
  auto tokenizer = Tokenizer::load(bundled_model());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
  return *std::move(tokenizer);
}

std::unique_ptr<Tokenizer> load_tiny(const TinyTokenizer& tiny) {
  auto tokenizer = Tokenizer::from_json(tiny.json());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().to_string();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

Ids encode(const Tokenizer& tokenizer, std::string_view text, const EncodeOptions& options = {}) {
  auto ids = tokenizer.encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status().to_string();
  return ids.ok() ? *std::move(ids) : Ids{};
}

TEST(TokenizerGolden, AllCases) {
  const auto tokenizer = load_bundled();
  const auto golden = golden_data();
  const auto& cases = golden.at("tokenizer").as_array();
  ASSERT_EQ(cases.size(), 80u);
  for (const auto& entry : cases) {
    const std::string text(entry.at("text").as_string());
    const Ids expected = boost::json::value_to<Ids>(entry.at("ids"));
    EXPECT_EQ(encode(*tokenizer, text), expected) << text;
    EXPECT_EQ(tokenizer->decode(expected, false), std::string(entry.at("decoded").as_string()));
  }
}

TEST(TokenizerGolden, TokenAccess) {
  const auto tokenizer = load_bundled();
  EXPECT_EQ(tokenizer->vocab_size(), 4096u);
  EXPECT_EQ(tokenizer->token_to_id("<|im_end|>"), 2);
  EXPECT_EQ(tokenizer->token_to_id("Ġthe"), 263);
  EXPECT_EQ(tokenizer->token_to_id("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer->token_bytes(263), " the");
  EXPECT_EQ(tokenizer->token_content(263), "Ġthe");
  EXPECT_EQ(tokenizer->token_bytes(2), "<|im_end|>");
  EXPECT_EQ(tokenizer->token_bytes(165), "\xE6");
  EXPECT_EQ(tokenizer->token_text(165), "\xEF\xBF\xBD");
  EXPECT_TRUE(tokenizer->is_special(2));
  EXPECT_FALSE(tokenizer->is_special(263));
  for (const std::int32_t id : {-1, 4096, 1 << 30}) {
    EXPECT_EQ(tokenizer->token_bytes(id), "");
    EXPECT_FALSE(tokenizer->is_special(id));
  }
  EXPECT_EQ(tokenizer->decode(Ids{1, 263, 2, 99999, -5}, true), " the");
}

TEST(Tokenizer, RoundTripsRandomText) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto tokenizer = load_bundled();
  for (int i = 0; i < 300; ++i) {
    const std::string text = random_text(random, random() % 200);
    EXPECT_EQ(tokenizer->decode(encode(*tokenizer, text), false), text);
  }
}

TEST(Tokenizer, MergesLowestRankThenLeftmost) {
  // "abab": (a,b) first makes ab ab, then (ab,ab).
  TinyTokenizer tiny{.merges = {{"a", "b"}, {"b", "a"}, {"ab", "ab"}}};
  auto tokenizer = load_tiny(tiny);
  EXPECT_THAT(encode(*tokenizer, "abab"), ElementsAre(258));
  EXPECT_THAT(encode(*tokenizer, "baba"), ElementsAre('b', 256, 'a'));
  EXPECT_THAT(encode(*tokenizer, "aaa"), ElementsAre('a', 'a', 'a'));
  tiny.merges_as_pairs = true;
  tokenizer = load_tiny(tiny);
  EXPECT_THAT(encode(*tokenizer, "abab"), ElementsAre(258));
}

// Merges one lowest-ranked, leftmost pair at a time over the whole word.
std::vector<std::string> merge_naively(
    std::vector<std::string> word,
    const std::map<std::pair<std::string, std::string>, int>& ranks) {
  while (true) {
    int best = 1 << 30;
    std::size_t at = 0;
    for (std::size_t i = 0; i + 1 < word.size(); ++i) {
      const auto found = ranks.find({word[i], word[i + 1]});
      if (found != ranks.end() && found->second < best) {
        best = found->second;
        at = i;
      }
    }
    if (best == 1 << 30) return word;
    word[at] += word[at + 1];
    word.erase(word.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(Tokenizer, AgreesWithNaiveMergingOnRandomVocabularies) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 20; ++round) {
    TinyTokenizer tiny;
    std::vector<std::string> pieces = {"a", "b", "c"};
    std::map<std::pair<std::string, std::string>, int> ranks;
    while (tiny.merges.size() < 30) {
      const auto& left = pieces[random() % pieces.size()];
      const auto& right = pieces[random() % pieces.size()];
      const std::string merged = left + right;
      if (merged.size() > 8 || std::find(pieces.begin(), pieces.end(), merged) != pieces.end()) {
        continue;
      }
      ranks[{left, right}] = static_cast<int>(tiny.merges.size());
      tiny.merges.emplace_back(left, right);
      pieces.push_back(merged);
    }
    const auto tokenizer = load_tiny(tiny);
    for (int i = 0; i < 20; ++i) {
      std::string text;
      std::vector<std::string> word;
      for (std::size_t n = random() % 60; n > 0; --n) {
        text.push_back(static_cast<char>('a' + random() % 3));
        word.emplace_back(1, text.back());
      }
      std::vector<std::string> tokens;
      for (const std::int32_t id : encode(*tokenizer, text)) {
        tokens.emplace_back(tokenizer->token_bytes(id));
      }
      EXPECT_EQ(tokens, merge_naively(word, ranks)) << text;
    }
  }
}

TEST(Tokenizer, IgnoreMergesTakesWholeWords) {
  // "abc" is a token that no order of merges reaches: (b,c) wins over (a,b), then a bc is stuck.
  TinyTokenizer tiny{.merges = {{"b", "c"}, {"a", "b"}, {"ab", "c"}}};
  EXPECT_THAT(encode(*load_tiny(tiny), "abc"), ElementsAre('a', 256));
  tiny.ignore_merges = true;
  EXPECT_THAT(encode(*load_tiny(tiny), "abc"), ElementsAre(258));
  EXPECT_THAT(encode(*load_tiny(tiny), "abcb"), ElementsAre('a', 256, 'b'));
}

TEST(Tokenizer, AddedTokensMatchLongestAndAtTheirEdges) {
  TinyTokenizer tiny;
  tiny.added_tokens = {
      added_token(300, "<s>"),
      added_token(301, "<s>>"),
      added_token(302, "<l>", {.lstrip = true}),
      added_token(303, "<r>", {.rstrip = true}),
      added_token(304, "wo", {.special = false, .single_word = true}),
  };
  const auto tokenizer = load_tiny(tiny);
  EXPECT_THAT(encode(*tokenizer, "a<s>b"), ElementsAre('a', 300, 'b'));
  EXPECT_THAT(encode(*tokenizer, "<s>>"), ElementsAre(301));
  EXPECT_THAT(encode(*tokenizer, "<s><s"), ElementsAre(300, '<', 's'));
  EXPECT_THAT(encode(*tokenizer, "a \t<l> b"), ElementsAre('a', 302, ' ', 'b'));
  EXPECT_THAT(encode(*tokenizer, "a <r> \u00a0b"), ElementsAre('a', ' ', 303, 'b'));
  EXPECT_THAT(encode(*tokenizer, "<r>  <l>"), ElementsAre(303, 302));
  EXPECT_THAT(encode(*tokenizer, "wo two wo2 (wo)"),
              ElementsAre(304, ' ', 't', 'w', 'o', ' ', 'w', 'o', '2', ' ', '(', 304, ')'));
}

TEST(Tokenizer, SpecialTokensCanBeLeftUnparsed) {
  TinyTokenizer tiny;
  tiny.added_tokens = {added_token(300, "<s>"), added_token(301, "<t>", {.special = false})};
  const auto tokenizer = load_tiny(tiny);
  EXPECT_THAT(encode(*tokenizer, "<s><t>", {.parse_special = false}),
              ElementsAre('<', 's', '>', 301));
  EXPECT_EQ(tokenizer->decode(Ids{300, 301, 'x'}, true), "<t>x");
}

TEST(Tokenizer, NormalizedAddedTokensMatchNormalizedText) {
  TinyTokenizer tiny;
  tiny.normalizer = {{"type", "Sequence"}, {"normalizers", boost::json::array{{{"type", "NFC"}}}}};
  // "é" written with a combining accent, in the token and in the text.
  tiny.added_tokens = {
      added_token(300, "[e\u0301]", {.special = false, .normalized = true}),
      added_token(301, "{e\u0301}", {.special = false, .normalized = false}),
  };
  const auto tokenizer = load_tiny(tiny);
  EXPECT_THAT(encode(*tokenizer, "[e\u0301]"), ElementsAre(300));
  EXPECT_THAT(encode(*tokenizer, "[\u00e9]"), ElementsAre(300));
  EXPECT_THAT(encode(*tokenizer, "{e\u0301}"), ElementsAre(301));
  EXPECT_THAT(encode(*tokenizer, "{\u00e9}"), ElementsAre('{', 0xC3, 0xA9, '}'));
  EXPECT_THAT(encode(*tokenizer, "e\u0301"), ElementsAre(0xC3, 0xA9));
}

TEST(Tokenizer, TemplateProcessingAddsTokensAround) {
  TinyTokenizer tiny;
  tiny.added_tokens = {added_token(300, "<bos>"), added_token(301, "<eos>")};
  tiny.post_processor = boost::json::parse(R"({
    "type": "Sequence", "processors": [
      {"type": "ByteLevel", "trim_offsets": true},
      {"type": "TemplateProcessing",
       "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}},
                  {"Sequence": {"id": "A", "type_id": 0}},
                  {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
       "pair": [],
       "special_tokens": {"<bos>": {"id": "<bos>", "ids": [300], "tokens": ["<bos>"]},
                          "<eos>": {"id": "<eos>", "ids": [301], "tokens": ["<eos>"]}}}]})");
  const auto tokenizer = load_tiny(tiny);
  EXPECT_THAT(encode(*tokenizer, "a"), ElementsAre(300, 'a', 301));
  EXPECT_THAT(encode(*tokenizer, ""), ElementsAre(300, 301));
  EXPECT_THAT(encode(*tokenizer, "a", {.add_special_tokens = false}), ElementsAre('a'));
  EXPECT_THAT(encode(*tokenizer, "a", {.max_tokens = 3}), ElementsAre(300, 'a', 301));
  EXPECT_FALSE(tokenizer->encode("ab", {.max_tokens = 3}).ok());
  EXPECT_FALSE(tokenizer->encode("", {.max_tokens = 1}).ok());
}

TEST(Tokenizer, MaxTokensIsAnError) {
  const auto tokenizer = load_bundled();
  EXPECT_EQ(encode(*tokenizer, "Hello, world!", {.max_tokens = 6}).size(), 6u);
  const auto refused = tokenizer->encode("Hello, world!", {.max_tokens = 5});
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(refused.status().message(), HasSubstr("more than 5 tokens"));
}

TEST(Tokenizer, InvalidUtf8NamesTheByte) {
  const auto tokenizer = load_bundled();
  for (const std::string_view bad : {"abc\xFFz", "abc\xC3", "abc\xED\xA0\x80", "abc\xC0\x80"}) {
    const auto refused = tokenizer->encode(bad);
    EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(refused.status().message(), HasSubstr("byte 3"));
  }
}

TEST(Tokenizer, LongWordsTakeLinearithmicTime) {
  const auto tokenizer = load_bundled();
  const auto start = std::chrono::steady_clock::now();
  constexpr std::size_t kQuarter = 1 << 18;  // quadratic time would be 10^11 steps
  for (const std::string& text : {std::string(4 * kQuarter, 'a'), std::string(kQuarter, ' '),
                                  std::string(kQuarter, '\n'), std::string(kQuarter, 'e')}) {
    const Ids ids = encode(*tokenizer, text);
    EXPECT_TRUE(tokenizer->decode(ids, false) == text) << text.size() << " of " << int{text[0]};
  }
  // Enough for an unoptimised build under a sanitizer on a busy machine.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST(Tokenizer, IsSharedBetweenThreads) {
  const auto tokenizer = load_bundled();
  const std::string text = "The quick brown fox, 1234 jumps over the lazy dog.\n\n";
  const Ids expected = encode(*tokenizer, text);
  std::vector<std::thread> threads;
  std::vector<int> agreed(4, 0);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const auto ids = tokenizer->encode(text);
        agreed[t] += ids.ok() && *ids == expected && tokenizer->decode(*ids, false) == text;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(agreed, ElementsAre(50, 50, 50, 50));
}

TEST(Tokenizer, LoadNamesTheMissingFile) {
  const auto missing = Tokenizer::load(bundled_model() / "recipe");
  EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
  EXPECT_THAT(missing.status().message(), HasSubstr("tokenizer.json"));
}

}  // namespace
}  // namespace spindle::text
