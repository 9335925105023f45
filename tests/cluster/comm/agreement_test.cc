#include "cluster/comm/agreement.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cluster/comm/local_group.h"
#include "tests/cluster/comm/group_checks.h"

namespace spindle::comm {
namespace {

// Every rank must get the same answer; returns it.
std::string compare(const std::vector<std::string>& values,
                    const std::vector<std::string>& names = {}) {
  const int size = static_cast<int>(values.size());
  LocalCluster cluster(size);
  std::vector<std::string> answers(values.size());
  testing::run_ranks(size, [&](int rank) {
    const auto r = static_cast<std::size_t>(rank);
    answers[r] = verify_same_on_all_ranks(cluster.host(rank), names.empty() ? "config" : names[r],
                                          values[r], Deadline::after_ms(5000))
                     .to_string();
  });
  for (const std::string& answer : answers) EXPECT_EQ(answer, answers[0]);
  return answers[0];
}

TEST(Agreement, EqualValuesAgree) {
  EXPECT_EQ(compare({"a"}), "OK");
  EXPECT_EQ(compare({"", "", ""}), "OK");
  EXPECT_EQ(compare({"x: 1\n", "x: 1\n"}), "OK");
}

TEST(Agreement, NamesTheRanksAndTheFirstLine) {
  EXPECT_EQ(compare({"a\nb\nc", "a\nb\nc", "a\nB\nC", "A\nb\nc"}),
            "INVALID_ARGUMENT: ranks 2, 3 differ from rank 0 in config: "
            "line 2 is \"b\" on rank 0 and \"B\" on rank 2");
}

TEST(Agreement, MissingLinesAndNewlinesAreDifferences) {
  EXPECT_EQ(compare({"a\nb", "a"}),
            "INVALID_ARGUMENT: rank 1 differs from rank 0 in config: "
            "line 2 is \"b\" on rank 0 and missing on rank 1");
  EXPECT_EQ(compare({"", "a"}),
            "INVALID_ARGUMENT: rank 1 differs from rank 0 in config: "
            "line 1 is missing on rank 0 and \"a\" on rank 1");
  EXPECT_EQ(compare({"a\n", "a"}),
            "INVALID_ARGUMENT: rank 1 differs from rank 0 in config: "
            "line 2 is missing on rank 0 and missing on rank 1");
}

TEST(Agreement, LongLinesAreCut) {
  const std::string answer = compare({std::string(1000, 'x'), std::string(1000, 'y')});
  EXPECT_LT(answer.size(), 500u);
  EXPECT_NE(answer.find("xxx...\""), std::string::npos);
}

TEST(Agreement, ComparingDifferentThingsIsAnError) {
  EXPECT_EQ(compare({"v", "v"}, {"config", "model"}),
            "INVALID_ARGUMENT: rank 1 differs from rank 0 in what they compare: "
            "\"config\" on rank 0, \"model\" on rank 1");
}

}  // namespace
}  // namespace spindle::comm
