#include "cluster/coordinator/layer_partition.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

namespace spindle::coordinator {
namespace {

using Ranges = std::vector<LayerRange>;

TEST(PartitionLayers, EqualLayersAreSplitEvenlyWithTheRestInFront) {
  EXPECT_EQ(*partition_layers(12, 1, {}), (Ranges{{0, 12}}));
  EXPECT_EQ(*partition_layers(12, 2, {}), (Ranges{{0, 6}, {6, 6}}));
  EXPECT_EQ(*partition_layers(12, 12, {}).value().begin(), (LayerRange{0, 1}));
  EXPECT_EQ(*partition_layers(7, 3, {}), (Ranges{{0, 3}, {3, 2}, {5, 2}}));
}

TEST(PartitionLayers, TheHeadCostsTheLastStageLayers) {
  // 6 + 6 would cost 7.33 at most, 7 + 5 costs 7.
  EXPECT_EQ(*partition_layers(12, 2, {1.0, 0.0, 1.33}), (Ranges{{0, 7}, {7, 5}}));
  EXPECT_EQ(*partition_layers(4, 2, {1.0, 10.0, 0.0}), (Ranges{{0, 1}, {1, 3}}));
}

TEST(PartitionLayers, RefusesMoreStagesThanLayers) {
  EXPECT_EQ(partition_layers(3, 4, {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(partition_layers(3, 0, {}).status().code(), StatusCode::kInvalidArgument);
}

double worst(const Ranges& ranges, const PartitionCosts& costs) {
  double largest = 0;
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    largest = std::max(largest, ranges[i].count * costs.layer + (i == 0 ? costs.embedding : 0) +
                                    (i + 1 == ranges.size() ? costs.head : 0));
  }
  return largest;
}

TEST(PartitionLayers, IsTheBestOfAllPartitions) {
  for (int layers = 3; layers <= 10; ++layers) {
    for (const double head : {0.0, 0.7, 2.5, 6.0}) {
      const PartitionCosts costs{1.0, 0.4, head};
      double best = std::numeric_limits<double>::infinity();
      for (int a = 1; a < layers - 1; ++a) {
        for (int b = 1; a + b < layers; ++b) {
          best = std::min(best, worst({{0, a}, {a, b}, {a + b, layers - a - b}}, costs));
        }
      }
      const Ranges ranges = *partition_layers(layers, 3, costs);
      EXPECT_DOUBLE_EQ(worst(ranges, costs), best);
      EXPECT_EQ(ranges[0].first, 0);
      EXPECT_EQ(ranges[1].first, ranges[0].count);
      EXPECT_EQ(ranges[2].first + ranges[2].count, layers);
    }
  }
}

TEST(PartitionAsTold, ChecksWhatItIsTold) {
  EXPECT_EQ(*partition_as_told(12, 2, std::vector{5, 7}), (Ranges{{0, 5}, {5, 7}}));
  EXPECT_FALSE(partition_as_told(12, 2, std::vector{5, 6}).ok());
  EXPECT_FALSE(partition_as_told(12, 2, std::vector{12}).ok());
  EXPECT_FALSE(partition_as_told(12, 2, std::vector{12, 0}).ok());
  EXPECT_FALSE(partition_as_told(12, 2, std::vector{13, -1}).ok());
}

}  // namespace
}  // namespace spindle::coordinator
