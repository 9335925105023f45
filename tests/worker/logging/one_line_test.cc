#include "worker/logging/one_line.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "cluster/text/utf8.h"

namespace spindle::worker {
namespace {

TEST(OneLine, KeepsTextAndEscapesWhatWouldLeaveTheLine) {
  EXPECT_EQ(one_line("plain, größe, 漢字 \xF0\x9F\x99\x82"), "plain, größe, 漢字 \xF0\x9F\x99\x82");
  EXPECT_EQ(one_line("a\nb\r\nc\td"), "a\\nb\\r\\nc\\td");
  EXPECT_EQ(one_line(std::string_view("a\0b\x1b[31m\x7f", 9)), "a\\x00b\\x1b[31m\\x7f");
  EXPECT_EQ(one_line("next\xC2\x85line\xE2\x80\xA8"), "next\\u0085line\\u2028");
  EXPECT_EQ(one_line("abc\xE2\x80\xAEtxt"), "abc\\u202etxt");
  EXPECT_EQ(one_line("cut \xE6\xBC"), "cut \\xe6\\xbc");
  EXPECT_EQ(one_line("\xFF\xC0\xAFok"), "\\xff\\xc0\\xafok");
  EXPECT_EQ(one_line(""), "");
}

TEST(OneLine, AnyBytesAreValidTextWithoutControlCharacters) {
  const auto seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (int round = 0; round < 500; ++round) {
    std::string bytes(random() % 40, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random() % 256);
    const std::string line = one_line(bytes);
    EXPECT_FALSE(text::find_invalid_utf8(line).has_value());
    for (const char byte : line) EXPECT_GE(static_cast<unsigned char>(byte), 0x20);
  }
}

TEST(OneLine, CutsBetweenCharacters) {
  EXPECT_EQ(cut_text("abcdef", 6), "abcdef");
  EXPECT_EQ(cut_text("abcdef", 4), "abcd...");
  EXPECT_EQ(cut_text("a漢字", 5), "a漢...");
  EXPECT_EQ(cut_text("a漢字", 3), "a...");
  EXPECT_EQ(cut_text("\x80\x80\x80\x80\x80\x80", 5).size(), 5U);  // no text, and no endless search
}

}  // namespace
}  // namespace spindle::worker
