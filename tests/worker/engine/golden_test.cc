// The whole path against the reference continuations: any number of stages, requests at once and
// prefill chunks must give the reference's tokens.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/worker/local_cluster.h"

namespace spindle::worker {
namespace {

struct Shape {
  int n_stages;
  int chunk;
  int at_once;
  std::size_t max_prompt;
  std::string name;
};

void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

class GoldenGreedyTest : public testing::TestWithParam<Shape> {};

TEST_P(GoldenGreedyTest, ContinuationsAreTheReferences) {
  const Shape& shape = GetParam();
  LocalClusterSettings settings;
  settings.n_stages = shape.n_stages;
  settings.rank.max_num_batched_tokens = shape.chunk;
  TestCluster cluster(settings);
  const std::vector<GoldenGreedy> cases = load_golden_greedy(shape.max_prompt);
  ASSERT_EQ(cases.size(), shape.max_prompt > 8000 ? 14u : 10u);
  for (std::size_t begin = 0; begin < cases.size();
       begin += static_cast<std::size_t>(shape.at_once)) {
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    const std::size_t end = std::min(cases.size(), begin + static_cast<std::size_t>(shape.at_once));
    for (std::size_t i = begin; i < end; ++i) {
      sinks.push_back(cluster.submit(greedy_request(cases[i].prompt, 32)));
    }
    for (std::size_t i = begin; i < end; ++i) {
      const Generated generated = sinks[i - begin]->wait();
      ASSERT_TRUE(generated.status.ok()) << generated.status.to_string();
      EXPECT_EQ(generated.tokens[0], cases[i].output) << cases[i].name;
      EXPECT_EQ(generated.ends_with[0], cases[i].ends_with_eos ? engine::FinishReason::kStop
                                                               : engine::FinishReason::kLength)
          << cases[i].name;
      EXPECT_EQ(generated.summary.prompt_tokens, static_cast<int>(cases[i].prompt.size()));
    }
  }
  cluster.stop();
  for (int stage = 0; stage < shape.n_stages; ++stage) {
    EXPECT_EQ(cluster.rank(stage).store().n_sequences(), 0u);
    EXPECT_EQ(cluster.rank(stage).store().pool().n_used(), 0);
    EXPECT_EQ(cluster.rank(stage).store().pool().n_reserved(), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, GoldenGreedyTest,
                         testing::Values(Shape{1, 512, 1, 8192, "OneStageAllPrompts"},
                                         Shape{2, 512, 4, 8192, "TwoStagesAllPrompts"},
                                         Shape{1, 8192, 1, 8192, "ChunkOf8192AllPrompts"},
                                         Shape{3, 512, 1, 3000, "ThreeStages"},
                                         Shape{4, 512, 16, 3000, "FourStages"},
                                         Shape{1, 64, 1, 3000, "ChunkOf64"},
                                         Shape{2, 8192, 16, 3000, "ChunkOf8192"},
                                         Shape{1, 512, 16, 3000, "SixteenAtOnce"}),
                         [](const auto& shape) { return shape.param.name; });

}  // namespace
}  // namespace spindle::worker
