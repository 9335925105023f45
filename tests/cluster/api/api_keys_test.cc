#include "cluster/api/api_keys.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace spindle::api {
namespace {

TEST(ApiKeys, LetsEveryoneInWithoutKeys) {
  EXPECT_FALSE(ApiKeys().required());
  EXPECT_TRUE(ApiKeys().accepts(""));
  EXPECT_TRUE(ApiKeys().accepts_authorization(""));
  const std::vector<std::string> empty{""};
  EXPECT_FALSE(ApiKeys(empty).required());
}

TEST(ApiKeys, AcceptsAnyOfItsKeys) {
  const std::vector<std::string> keys{"alpha", "beta"};
  const ApiKeys accepted(keys);
  EXPECT_TRUE(accepted.required());
  EXPECT_TRUE(accepted.accepts("alpha"));
  EXPECT_TRUE(accepted.accepts("beta"));
  for (const char* wrong : {"", "alph", "alphaa", "ALPHA", "gamma", "alpha beta"}) {
    EXPECT_FALSE(accepted.accepts(wrong)) << wrong;
  }
}

TEST(ApiKeys, ReadsTheAuthorizationHeader) {
  const std::vector<std::string> keys{"alpha"};
  const ApiKeys accepted(keys);
  for (const char* right : {"Bearer alpha", "bearer alpha", "BEARER  alpha "}) {
    EXPECT_TRUE(accepted.accepts_authorization(right)) << right;
  }
  for (const char* wrong : {"", "alpha", "Bearer", "Bearer ", "Basic alpha", "Bearer beta",
                            "Bearer alpha x", "Beareralpha"}) {
    EXPECT_FALSE(accepted.accepts_authorization(wrong)) << wrong;
  }
}

TEST(ApiKeys, TellsOwnersApart) {
  EXPECT_EQ(ApiKeys().owner_of("alpha"), 0U);  // everyone is the same
  const std::vector<std::string> keys{"alpha", "beta"};
  const ApiKeys accepted(keys);
  EXPECT_NE(accepted.owner_of("alpha"), 0U);
  EXPECT_NE(accepted.owner_of("alpha"), accepted.owner_of("beta"));
  EXPECT_EQ(accepted.owner_of_authorization("bearer  alpha "), accepted.owner_of("alpha"));
}

}  // namespace
}  // namespace spindle::api
