// Files that must be refused: unsupported features by name, malformed and hostile ones without
// harm.

#include "cluster/text/tokenizer_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "cluster/text/tokenizer.h"
#include "tests/cluster/text/golden_data.h"
#include "tests/cluster/text/tiny_tokenizer.h"

namespace spindle::text {
namespace {

using boost::json::value;
using testing::HasSubstr;

Status load_status(std::string_view json) { return Tokenizer::from_json(json).status(); }

// The tiny tokenizer with one value replaced, given by its path: "/model/vocab/a",
// "/model/merges/0".
std::string with(std::string_view path, const value& replacement) {
  value json = TinyTokenizer{.merges = {{"a", "b"}}}.build();
  value* at = &json;
  while (!path.empty()) {
    const std::string_view key = path.substr(1, path.find('/', 1) - 1);
    path.remove_prefix(1 + key.size());
    if (auto* array = at->if_array()) {
      at = &array->at(std::stoul(std::string(key)));
    } else {
      at = &at->as_object()[key];
    }
  }
  *at = replacement;
  return boost::json::serialize(json);
}

TEST(TokenizerJson, TheTinyTokenizerLoads) {
  EXPECT_TRUE(load_status(with("/version", "1.0")).ok());
}

TEST(TokenizerJson, UnsupportedFeaturesAreNamed) {
  const value lowercase = {{"type", "Lowercase"}};
  const value metaspace = {{"type", "Metaspace"}};
  const auto sequence = [](std::string_view key, const value& item) {
    return value{{"type", "Sequence"}, {key, boost::json::array{item}}};
  };
  const value split_then_nothing = {
      {"type", "Split"}, {"pattern", {{"String", "x"}}}, {"behavior", "Isolated"}};
  value bad_behavior = split_then_nothing;
  bad_behavior.as_object()["behavior"] = "Sideways";
  value bad_pattern = split_then_nothing;
  bad_pattern.as_object()["pattern"] = {{"Regex", R"(\h)"}};
  const std::vector<std::tuple<std::string, value, std::string>> cases = {
      {"/model/type", "WordPiece", "WordPiece"},
      {"/model/dropout", 0.1, "dropout"},
      {"/model/continuing_subword_prefix", "##", "continuing_subword_prefix"},
      {"/model/end_of_word_suffix", "</w>", "end_of_word_suffix"},
      {"/normalizer", lowercase, "Lowercase"},
      {"/normalizer", sequence("normalizers", lowercase), "Lowercase"},
      {"/pre_tokenizer", metaspace, "Metaspace"},
      {"/pre_tokenizer", sequence("pretokenizers", metaspace), "Metaspace"},
      {"/pre_tokenizer", split_then_nothing, "without ByteLevel"},
      {"/pre_tokenizer", bad_behavior, "Sideways"},
      {"/pre_tokenizer", bad_pattern, "\\h"},
      {"/post_processor", value{{"type", "BertProcessing"}}, "BertProcessing"},
      {"/post_processor", sequence("processors", value{{"type", "Roberta"}}), "Roberta"},
      {"/decoder", metaspace, "Metaspace"},
      {"/decoder", sequence("decoders", value{{"type", "Strip"}}), "Strip"},
  };
  for (const auto& [pointer, replacement, name] : cases) {
    const Status status = load_status(with(pointer, replacement));
    EXPECT_EQ(status.code(), StatusCode::kUnimplemented) << status.to_string();
    EXPECT_THAT(status.message(), HasSubstr(name));
  }
}

TEST(TokenizerJson, MalformedFieldsAreNamed) {
  const std::vector<std::tuple<std::string, value, std::string>> cases = {
      {"/model", nullptr, "model"},
      {"/model/vocab", boost::json::array{}, "model.vocab"},
      {"/model/vocab/a", "97", "\"a\""},
      {"/model/vocab/a", -1, "outside"},
      {"/model/vocab/a", 1 << 20, "outside"},
      {"/model/vocab/a", 9e300, "not an integer"},
      {"/model/vocab/a", 98, "twice"},
      {"/model/merges", "a b", "model.merges"},
      {"/model/merges/0", "ab", "model.merges[0]"},
      {"/model/merges/0", "a b c", "model.merges[0]"},
      {"/model/merges/0", boost::json::array{"a"}, "model.merges[0]"},
      {"/model/merges/0", boost::json::array{"a", 1}, "model.merges[0]"},
      {"/model/merges/0", "a zz", "\"zz\" is not in the vocabulary"},
      {"/model/merges/0", "b a", "\"ba\" is not in the vocabulary"},
      {"/model/ignore_merges", 1, "ignore_merges"},
      {"/added_tokens", value{{"a", 1}}, "added_tokens"},
      {"/added_tokens", boost::json::array{1}, "added_tokens[0]"},
      {"/added_tokens", boost::json::array{added_token(97, "<x>")}, "belongs to another"},
      {"/added_tokens", boost::json::array{added_token(300, "a")}, "vocabulary says 97"},
      {"/added_tokens", boost::json::array{added_token(300, "<x>"), added_token(300, "<y>")},
       "twice"},
      {"/added_tokens", boost::json::array{added_token(-7, "<x>")}, "added_tokens[0].id"},
      {"/added_tokens", boost::json::array{added_token(1 << 30, "<x>")}, "added_tokens[0].id"},
      {"/pre_tokenizer", 3, "pre_tokenizer"},
      {"/pre_tokenizer", value{{"type", 3}}, "pre_tokenizer.type"},
      {"/pre_tokenizer", nullptr, "pre_tokenizer"},
      {"/decoder", nullptr, "decoder"},
      {"/normalizer", "NFC", "normalizer"},
      {"/post_processor", value{{"type", "TemplateProcessing"}}, "post_processor.single"},
  };
  for (const auto& [pointer, replacement, name] : cases) {
    const Status status = load_status(with(pointer, replacement));
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << pointer << " " << status.to_string();
    EXPECT_THAT(status.message(), HasSubstr(name));
  }
}

TEST(TokenizerJson, IncompleteByteVocabulariesAreRefused) {
  boost::json::object json = TinyTokenizer{}.build();
  json["model"].as_object()["vocab"].as_object().erase("a");
  const Status status = load_status(boost::json::serialize(json));
  EXPECT_EQ(status.code(), StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(), HasSubstr("byte 97"));
  // A byte that no UTF-8 text contains is not missed.
  json = TinyTokenizer{}.build();
  json["model"].as_object()["vocab"].as_object().erase(alphabet_form("\xFF"));
  EXPECT_TRUE(load_status(boost::json::serialize(json)).ok());
}

TEST(TokenizerJson, TemplatesMustNameKnownTokens) {
  const auto template_with = [](std::string_view single, std::string_view ids) {
    return boost::json::parse(R"({"type": "TemplateProcessing", "single": )" + std::string(single) +
                              R"(, "special_tokens": {"<s>": {"id": "<s>", "ids": )" +
                              std::string(ids) + "}}}");
  };
  const std::string sequence = R"({"Sequence": {"id": "A", "type_id": 0}})";
  const std::string special = R"({"SpecialToken": {"id": "<s>", "type_id": 0}})";
  EXPECT_TRUE(load_status(with("/post_processor",
                               template_with("[" + special + "," + sequence + "]", "[97]")))
                  .ok());
  for (const auto& [single, ids] : std::vector<std::pair<std::string, std::string>>{
           {"[" + special + "]", "[97]"},
           {"[" + sequence + "," + sequence + "]", "[97]"},
           {"[" + special + "," + sequence + "]", "[5000]"},
           {"[" + special + "," + sequence + "]", "[-1]"},
           {"[" + special + "," + sequence + "]", "[\"x\"]"},
           {R"([{"SpecialToken": {"id": "<other>"}},)" + sequence + "]", "[97]"},
           {"[{}," + sequence + "]", "[97]"},
       }) {
    EXPECT_FALSE(load_status(with("/post_processor", template_with(single, ids))).ok()) << single;
  }
}

TEST(TokenizerJson, SizeAndDepthAreBounded) {
  EXPECT_EQ(load_status(std::string(kMaxTokenizerFileBytes + 1, ' ')).code(),
            StatusCode::kTooLarge);
  EXPECT_EQ(load_status(std::string(1 << 20, '[')).code(), StatusCode::kInvalidArgument);
  std::string deep = "1";
  for (int i = 0; i < 100; ++i) deep = "{\"model\":" + deep + "}";
  EXPECT_EQ(load_status(deep).code(), StatusCode::kInvalidArgument);
}

TEST(TokenizerJson, TruncatedFilesAreRefused) {
  const std::string whole = read_text(bundled_model() / "tokenizer.json");
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int i = 0; i < 100; ++i) {
    const std::size_t n_bytes =
        i < 20 ? static_cast<std::size_t>(i) : random() % (whole.size() - 8);
    EXPECT_EQ(load_status(std::string_view(whole).substr(0, n_bytes)).code(),
              StatusCode::kInvalidArgument);
  }
}

// Whatever loads after a few bytes were changed must also encode and decode without harm.
TEST(TokenizerJson, MutatedFilesAreHarmless) {
  TinyTokenizer tiny{.merges = {{"a", "b"}, {"ab", "c"}}};
  tiny.added_tokens = {added_token(300, "<s>", {.lstrip = true}),
                       added_token(301, "<t>", {.special = false, .normalized = true})};
  tiny.pre_tokenizer = boost::json::parse(R"({"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex": "\\s+|[^\\s]+?"}, "behavior": "Isolated"},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}]})");
  tiny.normalizer = {{"type", "NFC"}};
  const std::string whole = tiny.json();
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  int n_loaded = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string mutated = whole;
    for (std::size_t n = 1 + random() % 3; n > 0; --n) {
      const std::size_t at = random() % mutated.size();
      constexpr std::string_view kBytes = "0019{}[]\",:-eE\\a+*?()|";
      switch (random() % 3) {
        case 0:
          mutated[at] = kBytes[random() % kBytes.size()];
          break;
        case 1:
          mutated.erase(at, 1 + random() % 8);
          break;
        default:
          mutated.insert(at, 1, kBytes[random() % kBytes.size()]);
      }
    }
    const auto tokenizer = Tokenizer::from_json(mutated);
    if (!tokenizer.ok()) continue;
    ++n_loaded;
    const auto ids = (*tokenizer)->encode("abc <s> d\u0301 <t>\n");
    if (ids.ok()) (*tokenizer)->decode(*ids, i % 2 == 0);
  }
  EXPECT_GT(n_loaded, 0);
}

}  // namespace
}  // namespace spindle::text
