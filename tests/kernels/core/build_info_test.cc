#include "kernels/core/build_info.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace spindle {
namespace {

TEST(BuildInfoTest, TextHasALineForEachFact) {
  const BuildInfo build{"1.2.3", "0123456789ab", true};
  EXPECT_EQ(version_text("spindled", build, 1, 7),
            "spindled 1.2.3\ncommit 0123456789ab\nCUDA yes\nprotocol 1.7\n");
}

TEST(BuildInfoTest, NoCommitOutsideGit) {
  const BuildInfo build{"1.2.3", "", false};
  EXPECT_EQ(version_text("spindle", build, 2, 0), "spindle 1.2.3\nCUDA no\nprotocol 2.0\n");
}

TEST(BuildInfoTest, ThisBuild) {
  const BuildInfo build = build_info();
  EXPECT_THAT(std::string(build.version), testing::MatchesRegex("[0-9]+\\.[0-9]+\\.[0-9]+"));
  EXPECT_THAT(std::string(build.commit), testing::MatchesRegex("([0-9a-f]{12,40})?"));
}

}  // namespace
}  // namespace spindle
