#include "kernels/kv_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "kernels/kv_score.h"
#include "tests/kernels/golden_kv.h"
#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The recorded model and prompt.
constexpr int kLayers = 12;
constexpr int kKvHeads = 2;
constexpr int kGroup = 2;
constexpr int kWindow = 32;
constexpr std::int64_t kTokens = 1755;
constexpr std::int64_t kContext = kTokens - kWindow;

bool better(float a, float b) { return std::isnan(b) ? !std::isnan(a) : a > b; }

std::vector<std::int32_t> naive_ranks(std::span<const float> scores) {
  std::vector<std::int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return better(scores[static_cast<std::size_t>(a)], scores[static_cast<std::size_t>(b)]);
  });
  return order;
}

std::vector<std::int32_t> naive_top_k(std::span<const float> scores, std::int64_t k) {
  std::vector<std::int32_t> order = naive_ranks(scores);
  order.resize(static_cast<std::size_t>(
      std::clamp<std::int64_t>(k, 0, static_cast<std::int64_t>(order.size()))));
  return order;
}

std::vector<std::int32_t> ascending(std::vector<std::int32_t> indices) {
  std::sort(indices.begin(), indices.end());
  return indices;
}

// Few distinct values, so that ties are common, and every special one.
std::vector<float> tied_scores(Random& random, std::int64_t n) {
  const std::vector<float> special = {0.0F, -0.0F, kNan, -kNan, kInfinity, -kInfinity, 1e-42F};
  std::vector<float> scores = random.normals(n);
  for (float& score : scores) {
    score = std::round(score * 8.0F) / 8.0F;
    if (random.below(10) == 0) score = special[static_cast<std::size_t>(random.below(7))];
  }
  return scores;
}

TEST(KvSelectTest, TopKByEye) {
  const std::vector<float> scores = {0.5F, 2.0F, kNan, 1.0F, 2.0F, -kInfinity};
  EXPECT_THAT(rank_top_k(scores, 3), ElementsAre(1, 4, 3));
  EXPECT_THAT(select_top_k(scores, 3), ElementsAre(1, 3, 4));
  EXPECT_THAT(select_top_k(scores, 1), ElementsAre(1));
  EXPECT_THAT(rank_top_k(scores, 6), ElementsAre(1, 4, 3, 0, 5, 2));
  EXPECT_THAT(select_top_k(scores, 5), ElementsAre(0, 1, 3, 4, 5));
  EXPECT_THAT(select_top_k(scores, 600), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(select_top_k(scores, 0), IsEmpty());
  EXPECT_THAT(select_top_k(scores, -7), IsEmpty());
  EXPECT_THAT(select_top_k({}, 3), IsEmpty());
  const std::vector<float> zeros = {-0.0F, 0.0F, -0.0F};
  EXPECT_THAT(rank_top_k(zeros, 2), ElementsAre(0, 1));
}

TEST(KvSelectTest, TopKAgainstSorting) {
  Random random(31);
  for (const std::int64_t n : {1, 2, 7, 100, 3000}) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      const std::vector<float> scores = tied_scores(random, n);
      const std::int64_t k = random.below(n + 2);
      ASSERT_EQ(rank_top_k(scores, k), naive_top_k(scores, k)) << n << " " << k;
      ASSERT_EQ(select_top_k(scores, k), ascending(naive_top_k(scores, k))) << n << " " << k;
    }
  }
}

TEST(KvSelectTest, UnionByEye) {
  const std::vector<float> means = {0.4F, 0.1F, 0.3F, 0.2F,  //
                                    0.1F, 0.1F, 0.2F, 0.6F};
  const ConstRows view(means.data(), 2, 4);
  EXPECT_THAT(select_union(view, 1), ElementsAre(0, 3));
  EXPECT_THAT(select_union(view, 2), ElementsAre(0, 2, 3));
  EXPECT_THAT(select_union(view, 3), ElementsAre(0, 2, 3));
  EXPECT_THAT(select_union(view, 4), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(select_union(view, 0), IsEmpty());
  EXPECT_THAT(select_union(view.columns(1, 2), 1), ElementsAre(1));
}

// All heads in one list, sorted.
std::vector<std::int64_t> naive_global(std::span<const std::span<const float>> heads,
                                       std::int64_t k) {
  std::vector<float> all;
  std::vector<std::size_t> head_of;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    all.insert(all.end(), heads[h].begin(), heads[h].end());
    head_of.insert(head_of.end(), heads[h].size(), h);
  }
  std::vector<std::int64_t> counts(heads.size(), 0);
  for (const std::int32_t i : naive_top_k(all, k)) ++counts[head_of[static_cast<std::size_t>(i)]];
  return counts;
}

// The counts of the histograms may differ from the exact ones by the tokens of the bin that the
// threshold is in, and not in their sum.
void expect_close_counts(std::span<const std::span<const float>> heads, std::int64_t k) {
  std::vector<ScoreHistogram> histograms;
  std::vector<float> positive;
  for (const auto& head : heads) {
    histograms.push_back(score_histogram(head));
    ASSERT_EQ(histograms.back().total(), static_cast<std::int64_t>(head.size()));
    for (const float score : head) positive.push_back(score > 0.0F ? score : 0.0F);
  }
  const std::vector<std::int64_t> exact = global_top_k(heads, k);
  const std::vector<std::int64_t> counts = global_counts(histograms, k);
  const auto total = static_cast<std::int64_t>(positive.size());
  const std::int64_t n_kept = std::clamp<std::int64_t>(k, 0, total);
  ASSERT_EQ(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}), n_kept);
  ASSERT_EQ(std::accumulate(exact.begin(), exact.end(), std::int64_t{0}), n_kept);
  if (n_kept == 0) return;
  std::sort(positive.begin(), positive.end(), std::greater<>());
  const std::uint32_t threshold =
      std::bit_cast<std::uint32_t>(positive[static_cast<std::size_t>(n_kept - 1)]) >> 16;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    std::int64_t in_bin = 0;
    for (std::size_t i = 0; i < histograms[h].bin.size(); ++i) {
      if (histograms[h].bin[i] == threshold) in_bin = histograms[h].count[i];
    }
    ASSERT_LE(std::abs(counts[h] - exact[h]), in_bin) << "head " << h << " k " << k;
  }
}

TEST(KvSelectTest, GlobalByEye) {
  const std::vector<float> a = {1.0F, 3.0F, 2.0F};
  const std::vector<float> b = {2.0F, 5.0F};
  const std::vector<std::span<const float>> heads = {a, b};
  EXPECT_THAT(global_top_k(heads, 0), ElementsAre(0, 0));
  EXPECT_THAT(global_top_k(heads, -1), ElementsAre(0, 0));
  EXPECT_THAT(global_top_k(heads, 1), ElementsAre(0, 1));
  EXPECT_THAT(global_top_k(heads, 3), ElementsAre(2, 1)) << "the tie at 2 goes to the first head";
  EXPECT_THAT(global_top_k(heads, 4), ElementsAre(2, 2));
  EXPECT_THAT(global_top_k(heads, 99), ElementsAre(3, 2));
  EXPECT_THAT(global_top_k({}, 3), IsEmpty());
  EXPECT_THAT(global_counts({}, 3), IsEmpty());
}

TEST(KvSelectTest, HistogramByEye) {
  // 1 is 0x3f80'0000; the next bin begins at 1 + 2^-7.
  const std::vector<float> scores = {1.0F, 0.0F, 1.0F + 0x1p-7F, 1.0F + 0x1p-8F, -2.0F, kNan};
  const ScoreHistogram histogram = score_histogram(scores);
  EXPECT_THAT(histogram.bin, ElementsAre(0, 0x3f80, 0x3f81));
  EXPECT_THAT(histogram.count, ElementsAre(3, 2, 1));
  EXPECT_EQ(histogram.total(), 6);
  EXPECT_EQ(score_histogram({}).total(), 0);

  const std::vector<ScoreHistogram> heads = {histogram, histogram};
  EXPECT_THAT(global_counts(heads, 0), ElementsAre(0, 0));
  EXPECT_THAT(global_counts(heads, 1), ElementsAre(1, 0));
  EXPECT_THAT(global_counts(heads, 2), ElementsAre(1, 1));
  EXPECT_THAT(global_counts(heads, 5), ElementsAre(3, 2));
  EXPECT_THAT(global_counts(heads, 8), ElementsAre(5, 3));
  EXPECT_THAT(global_counts(heads, 12), ElementsAre(6, 6));
  EXPECT_THAT(global_counts(heads, 1000), ElementsAre(6, 6));
}

TEST(KvSelectTest, GlobalAgainstSorting) {
  Random random(32);
  for (int repeat = 0; repeat < 40; ++repeat) {
    std::vector<std::vector<float>> scores;
    for (std::int64_t h = 0; h < 1 + random.below(6); ++h) {
      scores.push_back(tied_scores(random, random.below(200)));
    }
    const std::vector<std::span<const float>> heads(scores.begin(), scores.end());
    std::int64_t total = 0;
    for (const auto& head : heads) total += static_cast<std::int64_t>(head.size());
    const std::int64_t k = random.below(total + 2);
    ASSERT_EQ(global_top_k(heads, k), naive_global(heads, k)) << "k " << k;
    expect_close_counts(heads, k);
  }
}

TEST(KvSelectTest, NanNeverBeatsANumber) {
  const std::vector<float> scores = {kNan, -1.0F, kNan, -kInfinity};
  const std::vector<std::span<const float>> heads = {scores};
  EXPECT_THAT(select_top_k(scores, 2), ElementsAre(1, 3));
  EXPECT_THAT(global_top_k(heads, 2), ElementsAre(2));
  EXPECT_THAT(select_union({scores.data(), 1, 4}, 1), ElementsAre(1));
}

TEST(KvSelectTest, SnapKvKeepsTheRecordedTokens) {
  const GoldenKv golden;
  for (const std::string reduce : {"mean", "max"}) {
    const auto scores = golden.read<float>("snap." + reduce + ".score");
    for (const std::int64_t kept : {64, 128, 256, 512}) {
      const auto expected =
          golden.read<std::int32_t>("snap." + reduce + ".keep" + std::to_string(kept));
      for (std::int64_t head = 0; head < kLayers * kKvHeads; ++head) {
        std::vector<std::int32_t> indices = select_top_k(
            std::span(scores).subspan(static_cast<std::size_t>(head * kContext), kContext),
            kept - kWindow);
        for (std::int64_t t = kContext; t < kTokens; ++t) {
          indices.push_back(static_cast<std::int32_t>(t));
        }
        ASSERT_TRUE(std::equal(indices.begin(), indices.end(), expected.begin() + head * kept,
                               expected.begin() + (head + 1) * kept))
            << reduce << kept << " head " << head;
      }
    }
  }
}

std::vector<std::int32_t> kept_context(const std::vector<std::uint8_t>& keep, std::int64_t head) {
  std::vector<std::int32_t> indices;
  for (std::int64_t t = 0; t < kContext; ++t) {
    if (keep[static_cast<std::size_t>(head * kTokens + t)] != 0) {
      indices.push_back(static_cast<std::int32_t>(t));
    }
  }
  return indices;
}

TEST(KvSelectTest, GlobalTopKKeepsTheRecordedTokens) {
  const GoldenKv golden;
  const auto scores = golden.read<float>("defensive.score");
  const auto keep = golden.read<std::uint8_t>("layerdefensive.keep20");
  std::vector<std::span<const float>> heads;
  for (std::int64_t head = 0; head < kLayers * kKvHeads; ++head) {
    heads.push_back(std::span(scores).subspan(static_cast<std::size_t>(head * kContext), kContext));
  }
  const std::int64_t k = 8424 - kLayers * kKvHeads * kWindow;
  const std::vector<std::int64_t> counts = global_top_k(heads, k);
  for (std::size_t head = 0; head < heads.size(); ++head) {
    EXPECT_EQ(select_top_k(heads[head], counts[head]),
              kept_context(keep, static_cast<std::int64_t>(head)))
        << "head " << head;
  }
  for (const std::int64_t any : {std::int64_t{1}, std::int64_t{100}, k, std::int64_t{30000}}) {
    expect_close_counts(heads, any);
  }
}

// The policy's context ratio is recorded to three digits; 0.25305 gives the recorded sets.
TEST(KvSelectTest, SpindleKvKeepsTheRecordedTokens) {
  const GoldenKv golden;
  const auto means = golden.read<float>("window.mean");  // [layer, query head, token]
  const auto keep = golden.read<std::uint8_t>("keep.spindlekv");
  for (int layer = 0; layer < kLayers; ++layer) {
    const double ratio = spindlekv_layer_ratio(0.25305, layer, kLayers);
    const auto k = static_cast<std::int64_t>(std::nearbyint(ratio * kContext));
    for (int head = 0; head < kKvHeads; ++head) {
      const std::int64_t row = std::int64_t{layer} * kKvHeads + head;
      const ConstRows group(means.data() + row * kGroup * kTokens, kGroup, kTokens);
      EXPECT_EQ(select_union(group.columns(0, kContext), k), kept_context(keep, row))
          << "layer " << layer << " head " << head;
    }
  }
}

TEST(KvSelectTest, LayerBudgetsAreTheRecordedOnes) {
  const GoldenKv golden;
  const auto ratios = golden.read<float>("pyramid.spindle");
  const auto kept = golden.read<std::int32_t>("pyramid.orig");
  const std::vector<double> steps = {0.1, 0.2, 0.4, 0.6};
  for (std::size_t i = 0; i < steps.size(); ++i) {
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::size_t at = i * kLayers + static_cast<std::size_t>(layer);
      EXPECT_NEAR(spindlekv_layer_ratio(steps[i], layer, kLayers), double{ratios[at]}, 1e-7)
          << steps[i] << " layer " << layer;
      EXPECT_EQ(pyramidkv_kept(kTokens, steps[i], kWindow, layer, kLayers), kept[at])
          << steps[i] << " layer " << layer;
    }
  }
}

TEST(KvSelectTest, LayerBudgetsAtTheirLimits) {
  for (const int layer : {0, 5, 11}) {
    EXPECT_EQ(spindlekv_layer_ratio(0.04, layer, 12), 0.04) << "below beta, the same everywhere";
    EXPECT_EQ(spindlekv_layer_ratio(1.0, layer, 12), 1.0);
    EXPECT_EQ(spindlekv_layer_ratio(7.0, layer, 12), 1.0);
    EXPECT_EQ(spindlekv_layer_ratio(-1.0, layer, 12), 0.0);
    EXPECT_EQ(pyramidkv_kept(1000, 1.0, 32, layer, 12), 1000);
    EXPECT_EQ(pyramidkv_kept(1000, 0.0, 32, layer, 12), 32) << "the window always stays";
    EXPECT_EQ(pyramidkv_kept(1000, 0.01, 32, layer, 12), 32);
    EXPECT_EQ(pyramidkv_kept(20, 0.5, 32, layer, 12), 20) << "shorter than the window";
  }
  EXPECT_DOUBLE_EQ(spindlekv_layer_ratio(0.3, 0, 1), 0.3);
  EXPECT_DOUBLE_EQ(spindlekv_layer_ratio(0.8, 0, 1), 0.8);
  EXPECT_EQ(pyramidkv_kept(1032, 0.25, 32, 0, 1), 258);
  // The pyramid's mean is the budget asked for.
  std::int64_t total = 0;
  for (int layer = 0; layer < 12; ++layer) total += pyramidkv_kept(5000, 0.3, 32, layer, 12);
  EXPECT_NEAR(static_cast<double>(total) / 12.0, 1500.0, 1.0);
}

}  // namespace
}  // namespace spindle::kernels
