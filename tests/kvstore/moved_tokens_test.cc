#include "kvstore/moved_tokens.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace spindle::kvstore {
namespace {

TEST(MovedTokens, AreARangeAListAndARange) {
  const std::vector<std::int32_t> list{7, 9, 20};
  const MovedTokens tokens(2, 5, list, 30, 32);
  const std::vector<std::int32_t> expected{2, 3, 4, 7, 9, 20, 30, 31};
  ASSERT_EQ(tokens.size(), expected.size());
  EXPECT_EQ(tokens.to_vector(), expected);
  for (std::size_t begin = 0; begin <= expected.size(); ++begin) {
    for (std::size_t end = begin; end <= expected.size(); ++end) {
      std::vector<std::int32_t> part(end - begin);
      tokens.copy(begin, end, part.data());
      EXPECT_TRUE(std::equal(part.begin(), part.end(),
                             expected.begin() + static_cast<std::ptrdiff_t>(begin)));
    }
    if (begin < expected.size()) {
      EXPECT_EQ(tokens[begin], expected[begin]);
    }
  }
  EXPECT_FALSE(tokens.is_consecutive());
  EXPECT_TRUE(MovedTokens().empty());
  EXPECT_TRUE(MovedTokens().is_consecutive());
  EXPECT_TRUE(MovedTokens(3, 8, {}, 40, 40).is_consecutive());
  EXPECT_TRUE(MovedTokens(5, 7, std::span(list).first(1), 8, 10).is_consecutive());
  EXPECT_FALSE(MovedTokens(0, 1, {}, 2, 3).is_consecutive());
  EXPECT_EQ(MovedTokens(0, 0, {}, 4, 6).to_vector(), (std::vector<std::int32_t>{4, 5}));
}

}  // namespace
}  // namespace spindle::kvstore
