#include "cluster/text/utf8.h"

#include <gtest/gtest.h>

#include "tests/cluster/text/random_text.h"

namespace spindle::text {
namespace {

std::string lossy(std::string_view bytes) {
  std::string out;
  LossyUtf8Decoder decoder;
  decoder.feed(bytes, out);
  decoder.finish(out);
  return out;
}

TEST(Utf8, FindsTheFirstInvalidByte) {
  EXPECT_EQ(find_invalid_utf8(""), std::nullopt);
  EXPECT_EQ(find_invalid_utf8("aé日🙂\x7F"), std::nullopt);
  EXPECT_EQ(find_invalid_utf8("\xF4\x8F\xBF\xBF"), std::nullopt);  // U+10FFFF
  EXPECT_EQ(find_invalid_utf8("a\x80"), 1u);                       // continuation alone
  EXPECT_EQ(find_invalid_utf8("ab\xC3"), 2u);                      // cut off
  EXPECT_EQ(find_invalid_utf8("\xC1\xBF"), 0u);                    // overlong
  EXPECT_EQ(find_invalid_utf8("\xE0\x9F\xBF"), 0u);                // overlong
  EXPECT_EQ(find_invalid_utf8("\xED\xA0\x80"), 0u);                // surrogate
  EXPECT_EQ(find_invalid_utf8("\xF4\x90\x80\x80"), 0u);            // above U+10FFFF
  EXPECT_EQ(find_invalid_utf8("\xFF"), 0u);
}

TEST(Utf8, CodePoints) {
  const std::string text = "aé日🙂";
  std::size_t offset = 0;
  EXPECT_EQ(next_code_point(text, offset), U'a');
  EXPECT_EQ(next_code_point(text, offset), U'é');
  EXPECT_EQ(next_code_point(text, offset), U'日');
  EXPECT_EQ(next_code_point(text, offset), U'🙂');
  EXPECT_EQ(offset, text.size());
  EXPECT_EQ(last_code_point(text), U'🙂');
  EXPECT_EQ(count_code_points(text), 4u);
}

// The expected texts are what Python's bytes.decode("utf-8", errors="replace") gives.
TEST(Utf8, LossyDecodingReplacesMaximalParts) {
  EXPECT_EQ(lossy("a\xFF\x80z"), "a\uFFFD\uFFFDz");
  EXPECT_EQ(lossy("\xE6\x97"), "\uFFFD");    // cut off
  EXPECT_EQ(lossy("\xE6\x97z"), "\uFFFDz");  // cut short
  EXPECT_EQ(lossy("\xF0\x9F\x99\xE6\x97\xA5"), "\uFFFD日");
  EXPECT_EQ(lossy("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");  // a surrogate is no sequence at all
  EXPECT_EQ(lossy("\xC0\x80"), "\uFFFD\uFFFD");
  EXPECT_EQ(lossy("\xF4\x90\x80"), "\uFFFD\uFFFD\uFFFD");
}

TEST(Utf8, LossyDecodingDoesNotDependOnTheCuts) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  for (int i = 0; i < 300; ++i) {
    std::string bytes = random_text(random, random() % 20);
    for (char& c : bytes) {
      if (random() % 6 == 0) c = static_cast<char>(random());
    }
    std::string out;
    LossyUtf8Decoder decoder;
    for (std::size_t at = 0; at < bytes.size();) {
      const std::size_t n = 1 + random() % 4;
      decoder.feed(std::string_view(bytes).substr(at, n), out);
      EXPECT_EQ(find_invalid_utf8(out), std::nullopt);
      at += n;
    }
    decoder.finish(out);
    EXPECT_EQ(out, lossy(bytes));
  }
}

}  // namespace
}  // namespace spindle::text
