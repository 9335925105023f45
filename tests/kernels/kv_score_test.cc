#include "kernels/kv_score.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/kv_select.h"
#include "tests/kernels/golden_kv.h"
#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

using KvScoreTest = KernelTest;
using testing::ElementsAre;
using testing::FloatNear;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// [n_rows][n], all in fp64: the oracle's probabilities.
using Matrix = std::vector<std::vector<double>>;

Matrix naive_softmax(ConstRows logits) {
  Matrix p;
  for (std::int64_t j = 0; j < logits.n_rows; ++j) {
    std::vector<double> row(static_cast<std::size_t>(logits.width), 0.0);
    const std::int64_t last = logits.width - logits.n_rows + j;
    double best = -std::numeric_limits<double>::infinity();
    for (std::int64_t t = 0; t <= last; ++t) best = std::max(best, double{logits.row(j)[t]});
    double sum = 0.0;
    for (std::int64_t t = 0; t <= last; ++t) sum += std::exp(double{logits.row(j)[t]} - best);
    for (std::int64_t t = 0; t <= last; ++t) {
      row[static_cast<std::size_t>(t)] = std::exp(double{logits.row(j)[t]} - best) / sum;
    }
    p.push_back(std::move(row));
  }
  return p;
}

std::vector<float> random_logits(Random& random, std::int64_t n) {
  std::vector<float> logits = random.normals(n);
  for (float& logit : logits) logit *= 4.0F;
  return logits;
}

// A random causal matrix of probabilities, [w, n].
std::vector<float> random_probabilities(Random& random, const CpuContext& context, std::int64_t w,
                                        std::int64_t n) {
  std::vector<float> p = random_logits(random, w * n);
  window_softmax(context, {p.data(), w, n});
  return p;
}

void expect_near(std::span<const float> values, const std::vector<double>& expected,
                 double relative) {
  ASSERT_EQ(values.size(), expected.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_NEAR(double{values[i]}, expected[i], relative * std::abs(expected[i]) + 1e-37) << i;
  }
}

TEST_P(KvScoreTest, SoftmaxByEye) {
  const float ln3 = std::log(3.0F);
  std::vector<float> logits = {5.0F,  5.0F + ln3, kNan,  //
                               1e30F, 1e30F,      1e30F};
  window_softmax(context(), {logits.data(), 2, 3});
  EXPECT_THAT(logits, testing::Pointwise(testing::FloatNear(1e-6F),
                                         {0.25F, 0.75F, 0.0F, 1.0F / 3, 1.0F / 3, 1.0F / 3}));
  EXPECT_EQ(logits[2], 0.0F) << "what a row may not see is exactly zero";
}

TEST_P(KvScoreTest, SoftmaxAgainstDoublePrecision) {
  Random random(41);
  for (const std::int64_t n : {1, 2, 31, 33, 100, 5000}) {
    for (const std::int64_t w : {0, 1, 3, 32}) {
      if (w > n) continue;
      const std::vector<float> logits = random_logits(random, w * n);
      const Matrix expected = naive_softmax({logits.data(), w, n});
      GuardedRows p(w, n);
      for (std::int64_t j = 0; j < w; ++j)
        std::copy_n(&logits[static_cast<std::size_t>(j * n)], n, p.view().row(j));
      window_softmax(context(), p.view());
      p.check();
      for (std::int64_t j = 0; j < w; ++j) {
        for (std::int64_t t = 0; t < n; ++t) {
          const double exact = expected[static_cast<std::size_t>(j)][static_cast<std::size_t>(t)];
          ASSERT_NEAR(p.at(j, t), exact, 2e-6 * exact) << n << " row " << j << " column " << t;
        }
      }
    }
  }
}

TEST_P(KvScoreTest, MeanAndMaxAgainstDoublePrecision) {
  Random random(42);
  for (const std::int64_t n : {33, 1024, 2500}) {
    const std::vector<float> p = random_probabilities(random, context(), 32, n);
    std::vector<double> mean(static_cast<std::size_t>(n), 0.0);
    std::vector<double> max(static_cast<std::size_t>(n), 0.0);
    for (std::size_t i = 0; i < p.size(); ++i) {
      const std::size_t t = i % static_cast<std::size_t>(n);
      mean[t] += double{p[i]} / 32.0;
      max[t] = std::max(max[t], double{p[i]});
    }
    GuardedRows means(2, n);
    const auto size = static_cast<std::size_t>(n);
    window_mean(context(), {p.data(), 32, n}, {means.view().row(0), size});
    window_max(context(), {p.data(), 32, n}, {means.view().row(1), size});
    means.check();
    expect_near({means.view().row(0), size}, mean, 2e-7);
    expect_near({means.view().row(1), size}, max, 0.0);
  }
}

TEST_P(KvScoreTest, LazyMassByEye) {
  // Two rows over five tokens: the queries at positions 3 and 4.
  const std::vector<float> p = {0.1F, 0.2F, 0.3F, 0.4F, 0.0F,  //
                                0.1F, 0.1F, 0.2F, 0.2F, 0.4F};
  const ConstRows view(p.data(), 2, 5);
  EXPECT_FLOAT_EQ(lazy_mass_decode(view, 1, 2), 0.7F);
  EXPECT_FLOAT_EQ(lazy_mass_decode(view, 4, 3), 1.0F) << "nothing counts twice";
  EXPECT_FLOAT_EQ(lazy_mass_decode(view, 0, 0), 0.0F);
  EXPECT_FLOAT_EQ(lazy_mass_decode(view, 99, 0), 1.0F);
  // Row 0: token 0 and token 2; row 1: token 0 and token 3.
  EXPECT_FLOAT_EQ(lazy_mass_prefill(view, 1, 1), (0.4F + 0.3F) / 2);
  EXPECT_FLOAT_EQ(lazy_mass_prefill(view, 0, 1000), (0.6F + 0.6F) / 2) << "without self";
}

TEST_P(KvScoreTest, LazyMassAgainstItsDefinition) {
  Random random(43);
  const std::int64_t w = 32;
  for (const std::int64_t n : {32, 70, 400}) {
    const std::vector<float> p = random_probabilities(random, context(), w, n);
    for (const std::int64_t window : {0, 1, 16, 64, 256, 1024}) {
      for (const int sinks : {0, 4, 100}) {
        double decode = 0.0;
        double prefill = 0.0;
        for (std::int64_t j = 0; j < w; ++j) {
          for (std::int64_t t = 0; t < n; ++t) {
            const double value = p[static_cast<std::size_t>(j * n + t)];
            const std::int64_t distance = n - w + j - t;
            if (t < sinks || (distance >= 1 && distance <= window)) prefill += value / w;
            if (j == w - 1 && (t < sinks || t >= n - window)) decode += value;
          }
        }
        const ConstRows view(p.data(), w, n);
        ASSERT_NEAR(lazy_mass_decode(view, sinks, window), decode, 1e-6);
        ASSERT_NEAR(lazy_mass_prefill(view, sinks, window), prefill, 1e-6);
      }
    }
  }
}

TEST_P(KvScoreTest, SnapKvByEye) {
  // Four tokens before a window of one; the window's column must not leak into the pool.
  const std::vector<float> means = {5.0F, 0.0F, 10.0F, 0.0F,  100.0F,  //
                                    0.0F, 0.0F, 0.0F,  20.0F, 100.0F};
  std::vector<float> scores(4);
  snapkv_scores({means.data(), 2, 5}, 1, GroupReduce::kMean, scores);
  EXPECT_THAT(scores, ElementsAre(1.5F, 3.5F, 3.5F, 3.0F));
  snapkv_scores({means.data(), 2, 5}, 1, GroupReduce::kMax, scores);
  EXPECT_THAT(scores, ElementsAre(3.0F, 4.0F, 4.0F, 4.0F));
  snapkv_scores({means.data(), 2, 5}, 5, GroupReduce::kMean, {});
}

TEST_P(KvScoreTest, SnapKvScoresAreTheRecordedOnes) {
  const GoldenKv golden;
  const auto means = golden.read<float>("window.mean");  // [12 layers, 4 query heads, 1755]
  for (const GroupReduce reduce : {GroupReduce::kMean, GroupReduce::kMax}) {
    const auto expected = golden.read<float>(
        reduce == GroupReduce::kMean ? "snap.mean.score" : "snap.max.score");  // [12, 2, 1723]
    for (std::size_t head = 0; head < 24; ++head) {
      std::vector<float> scores(1723);
      snapkv_scores({means.data() + head * 2 * 1755, 2, 1755}, 32, reduce, scores);
      const auto begin = expected.begin() + static_cast<std::ptrdiff_t>(head * 1723);
      expect_near(scores, {begin, begin + 1723}, 1e-6);
    }
  }
}

TEST_P(KvScoreTest, KeyDiffByEye) {
  // The mean of the unit keys (1, 0), (1, 0), (0, 1) points to (2, 1).
  const std::vector<float> keys = {3, 0, 0.5, 0, 0, 7, 0, 0, kNan, 1};
  std::vector<float> scores(5);
  keydiff_scores(context(), {keys.data(), 5, 2}, scores);
  const float along = 2.0F / std::sqrt(5.0F);
  EXPECT_THAT(std::span(scores).first(4),
              ElementsAre(FloatNear(-along, 1e-6F), FloatNear(-along, 1e-6F),
                          FloatNear(-along / 2, 1e-6F), 0.0F));
  EXPECT_TRUE(std::isnan(scores[4]));
  EXPECT_THAT(select_top_k(scores, 2), ElementsAre(2, 3));
}

TEST_P(KvScoreTest, KeyDiffAgainstDoublePrecision) {
  Random random(44);
  for (const std::int64_t dim : {1, 7, 64, 80}) {
    for (const std::int64_t n : {0, 1, 5, 700, 1537}) {
      const std::vector<float> keys = random.normals(n * dim);
      std::vector<double> mean(static_cast<std::size_t>(dim), 0.0);
      std::vector<double> norms;
      const auto at = [&](std::int64_t t, std::int64_t d) {
        return double{keys[static_cast<std::size_t>(t * dim + d)]};
      };
      for (std::int64_t t = 0; t < n; ++t) {
        double square = 0.0;
        for (std::int64_t d = 0; d < dim; ++d) square += at(t, d) * at(t, d);
        norms.push_back(std::sqrt(square));
        for (std::int64_t d = 0; d < dim; ++d) {
          mean[static_cast<std::size_t>(d)] += at(t, d) / norms.back();
        }
      }
      const double length =
          std::sqrt(std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.0));
      std::vector<float> scores(static_cast<std::size_t>(n));
      keydiff_scores(context(), {keys.data(), n, dim}, scores);
      for (std::int64_t t = 0; t < n; ++t) {
        double dot = 0.0;
        for (std::int64_t d = 0; d < dim; ++d) dot += at(t, d) * mean[static_cast<std::size_t>(d)];
        ASSERT_NEAR(scores[static_cast<std::size_t>(t)],
                    -dot / norms[static_cast<std::size_t>(t)] / length, 1e-6);
      }
    }
  }
}

TEST_P(KvScoreTest, ValueNormsByEye) {
  // Two query heads of one KV head, head_dim 1: columns (1, -2) and (3, 0) of the projection.
  const std::vector<float> weight = {1, 3, -2, 0};
  const std::vector<WeightSource> sources = {{weight.data(), DType::kF32, 2}};
  const std::vector<float> bias = {100, 100};
  const auto packed =
      std::move(PackedLinear::pack(context(), sources, 2, LinearMath::kF32, bias)).value();
  const std::vector<float> v = {1, -2};
  GuardedRows norms(1, 2);
  value_output_norms(context(), packed, {v.data(), 2, 1}, 2, 1, norms.view());
  norms.check();
  EXPECT_EQ(norms.at(0, 0), 3.0F) << "(3 + 3) / 2";
  EXPECT_EQ(norms.at(0, 1), 6.0F);
}

// Hidden 3000 takes 87 tokens at once.
TEST_P(KvScoreTest, ValueNormsAgainstDoublePrecision) {
  Random random(45);
  const std::int64_t dim = 12;
  for (const auto& [n_heads, n_kv_heads, hidden, n] :
       std::vector<std::array<int, 4>>{{4, 2, 70, 50}, {3, 3, 33, 9}, {2, 1, 3000, 100}}) {
    const std::int64_t n_in = n_heads * dim;
    std::vector<float> weight = random.normals(hidden * n_in);
    std::vector<std::uint16_t> halves;
    for (float& value : weight) {
      halves.push_back(f32_to_bf16(value));
      value = bf16_to_f32(halves.back());
    }
    std::vector<float> v = random.normals(n * n_kv_heads * dim);
    for (float& value : v) value = bf16_to_f32(f32_to_bf16(value));
    for (const LinearMath math : {LinearMath::kF32, LinearMath::kBF16}) {
      const std::vector<WeightSource> sources = {{halves.data(), DType::kBF16, hidden}};
      const auto packed = PackedLinear::pack(context(), sources, n_in, math);
      if (packed.status().code() == StatusCode::kUnimplemented) continue;
      GuardedRows norms(n_kv_heads, n);
      value_output_norms(context(), *packed, {v.data(), n, n_kv_heads * dim}, n_heads, n_kv_heads,
                         norms.view());
      norms.check();
      const int group = n_heads / n_kv_heads;
      for (int t = 0; t < n; t += 7) {
        for (int kv = 0; kv < n_kv_heads; ++kv) {
          double norm = 0.0;
          for (int h = kv * group; h < (kv + 1) * group; ++h) {
            for (int row = 0; row < hidden; ++row) {
              double sum = 0.0;
              for (int d = 0; d < dim; ++d) {
                sum += double{weight[static_cast<std::size_t>(row * n_in + h * dim + d)]} *
                       double{v[static_cast<std::size_t>((t * n_kv_heads + kv) * dim + d)]};
              }
              norm += std::abs(sum) / group;
            }
          }
          ASSERT_NEAR(norms.at(kv, t), norm, 2e-6 * norm) << "token " << t << " head " << kv;
        }
      }
    }
  }
}

TEST_P(KvScoreTest, NormalisedNormsAddUpToOne) {
  std::vector<float> norms = {1, 0, 2, 3, 0, 2};
  normalize_value_norms({norms.data(), 2, 3});
  EXPECT_THAT(norms, ElementsAre(0.25F, 0.0F, 0.5F, 0.75F, 0.0F, 0.5F));
}

struct NaiveHead {
  std::vector<double> score;
  std::vector<double> mean;
  double window_mass = 0.0;
};

NaiveHead naive_defensive(ConstRows p, std::int64_t w, const std::vector<float>& norms) {
  const std::int64_t c = p.width - w;
  NaiveHead head{std::vector<double>(static_cast<std::size_t>(c), 0.0),
                 std::vector<double>(static_cast<std::size_t>(c), 0.0), 0.0};
  const double share = 1.0 / static_cast<double>(p.n_rows);
  for (std::int64_t i = 0; i < p.n_rows; ++i) {
    std::vector<double> pooled(static_cast<std::size_t>(c), 0.0);
    double mass = 0.0;
    for (std::int64_t t = 0; t < c; ++t) {
      mass += double{p.row(i)[t]};
      head.mean[static_cast<std::size_t>(t)] += share * double{p.row(i)[t]};
      for (std::int64_t u = t - 2; u <= t + 2; ++u) {
        if (u >= 0 && u < c) pooled[static_cast<std::size_t>(u)] += double{p.row(i)[t]} / 5.0;
      }
    }
    for (std::int64_t t = c; t < p.width; ++t) head.window_mass += share * double{p.row(i)[t]};
    const double pooled_mass = std::accumulate(pooled.begin(), pooled.end(), 0.0);
    for (std::size_t t = 0; t < pooled.size(); ++t) {
      if (pooled_mass > 0.0) {
        head.score[t] = std::max(head.score[t], pooled[t] * mass / pooled_mass);
      }
    }
  }
  const double floor =
      std::accumulate(head.score.begin(), head.score.end(), 0.0) / static_cast<double>(c);
  for (std::size_t t = 0; t < head.score.size(); ++t) {
    head.score[t] = std::max(head.score[t], floor) * double{norms[t]};
  }
  return head;
}

TEST_P(KvScoreTest, DefensiveByEye) {
  // One query head, a window of one, three tokens before it. Every pool sees all three, so each
  // pooled value is their sum / 5 and renormalising makes it their mean.
  const std::vector<float> p = {0.1F, 0.2F, 0.3F, 0.4F};
  const std::vector<float> norms = {0.5F, 1.0F, 0.25F};
  std::vector<float> score(3);
  std::vector<float> mean(3);
  DefensiveHead head{score, mean};
  defensive_scores(context(), {p.data(), 1, 4}, 1, 1, norms, head);
  EXPECT_THAT(score,
              ElementsAre(FloatNear(0.1F, 1e-7F), FloatNear(0.2F, 1e-7F), FloatNear(0.05F, 1e-7F)));
  EXPECT_THAT(mean, ElementsAre(0.1F, 0.2F, 0.3F));
  EXPECT_FLOAT_EQ(head.window_mass, 0.4F);

  DefensiveHead empty{};
  defensive_scores(context(), {p.data(), 4, 1}, 4, 1, {}, empty);
  EXPECT_FLOAT_EQ(empty.window_mass, 0.25F) << "no context: (0.1 + 0.2 + 0.3 + 0.4) / 4";
}

TEST_P(KvScoreTest, DefensiveAgainstDoublePrecision) {
  Random random(46);
  for (const std::int64_t c : {1, 2, 3, 4, 5, 6, 20, 21, 2049, 5000}) {
    for (const auto& [group, w] : {std::pair{1, 1}, std::pair{2, 32}, std::pair{3, 5}}) {
      const std::int64_t n = c + w;
      std::vector<float> p;
      for (int g = 0; g < group; ++g) {
        const std::vector<float> part = random_probabilities(random, context(), w, n);
        p.insert(p.end(), part.begin(), part.end());
      }
      std::vector<float> norms = random.normals(c);
      for (float& norm : norms) norm = std::abs(norm);
      const ConstRows view(p.data(), group * w, n);
      const NaiveHead expected = naive_defensive(view, w, norms);
      GuardedRows out(2, c);
      const auto size = static_cast<std::size_t>(c);
      DefensiveHead head{{out.view().row(0), size}, {out.view().row(1), size}};
      defensive_scores(context(), view, group, w, norms, head);
      out.check();
      expect_near(head.score, expected.score, 2e-6);
      expect_near(head.mean, expected.mean, 2e-6);
      ASSERT_NEAR(head.window_mass, expected.window_mass, 1e-6);

      const auto single = context_with(1);
      GuardedRows again(2, c);
      DefensiveHead other{{again.view().row(0), size}, {again.view().row(1), size}};
      defensive_scores(*single, view, group, w, norms, other);
      expect_same_bits(out.view(), again.view());
    }
  }
}

// A NaN (an overflow in one query) takes its row, and that row must not decide what is kept.
TEST_P(KvScoreTest, ANanRowDoesNotWin) {
  Random random(47);
  std::vector<float> p = random_logits(random, 400);
  p[150] = kNan;
  window_softmax(context(), {p.data(), 4, 100});
  for (std::size_t i = 0; i < p.size(); ++i) {
    ASSERT_EQ(std::isnan(p[i]), i >= 100 && i < 198) << i;
  }
  std::vector<float> rest(p.begin(), p.begin() + 100);
  rest.insert(rest.end(), p.begin() + 200, p.end());
  const std::vector<float> norms(96, 0.5F);
  const NaiveHead expected = naive_defensive({rest.data(), 3, 100}, 4, norms);
  std::vector<float> score(96);
  std::vector<float> mean(96);
  std::vector<DefensiveHead> heads = {{score, mean}};
  defensive_scores(context(), {p.data(), 4, 100}, 1, 4, norms, heads[0]);
  defensive_boost(heads, 50);
  expect_near(score, expected.score, 2e-6);
}

TEST_P(KvScoreTest, BoostByEye) {
  // The layer's window mass is 0.3, so tokens before the point of 0.6 are boosted: of the first
  // head those before 0.5 + 0.3 (token 1), of the second one 0.4 (token 2), and 0.4 + 0.3 is past.
  std::vector<float> score_a = {0.1F, 0.2F, 0.3F};
  std::vector<float> mean_a = {0.06F, 0.1F, 0.04F};
  std::vector<float> score_b = {0.9F, 0.2F, 0.4F};
  std::vector<float> mean_b = {0.3F, 0.3F, 0.4F};
  std::vector<DefensiveHead> heads = {{score_a, mean_a, 0.2F}, {score_b, mean_b, 0.4F}};
  const std::vector<std::vector<float>> before = {score_a, score_b};
  defensive_boost(heads, 0);
  EXPECT_EQ(score_a, before[0]);
  EXPECT_EQ(score_b, before[1]);
  defensive_boost(heads, 3);
  EXPECT_THAT(score_a, ElementsAre(0.1F, FloatNear(0.9002F, 1e-6F), 0.3F));
  EXPECT_THAT(score_b, ElementsAre(0.9F, 0.2F, FloatNear(0.9004F, 1e-6F)));
}

// The recorded scores show who was boosted: these and no others stand above the layer's highest
// unboosted score.
TEST_P(KvScoreTest, BoostsTheRecordedTokens) {
  constexpr std::size_t kTokens = 1755;
  constexpr std::size_t kContext = kTokens - 32;
  const GoldenKv golden;
  const auto means = golden.read<float>("window.mean");         // [12, 4, 1755]
  const auto recorded = golden.read<float>("defensive.score");  // [12, 2, 1723]
  for (std::size_t layer = 0; layer < 12; ++layer) {
    std::vector<std::vector<float>> mean(2, std::vector<float>(kContext));
    std::vector<std::vector<float>> score(2, std::vector<float>(kContext, 0.5F));
    std::vector<DefensiveHead> heads;
    for (std::size_t head = 0; head < 2; ++head) {
      double mass = 0.0;
      const float* group = means.data() + (layer * 4 + head * 2) * kTokens;
      for (std::size_t t = 0; t < kTokens; ++t) {
        const float value = (group[t] + group[kTokens + t]) / 2.0F;
        if (t < kContext) {
          mean[head][t] = value;
        } else {
          mass += double{value};
        }
      }
      heads.push_back({score[head], mean[head], static_cast<float>(mass)});
    }
    defensive_boost(heads, 351 - 32);  // 351 = int(0.2 * 1755)
    float lowest_boosted = std::numeric_limits<float>::infinity();
    float highest_other = 0.0F;
    std::size_t n_boosted = 0;
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t t = 0; t < kContext; ++t) {
        const float value = recorded[(layer * 2 + head) * kContext + t];
        if (score[head][t] > 0.5F) {
          ++n_boosted;
          lowest_boosted = std::min(lowest_boosted, value);
        } else {
          highest_other = std::max(highest_other, value);
        }
      }
    }
    EXPECT_GT(n_boosted, 0U);
    EXPECT_GT(lowest_boosted, highest_other) << "layer " << layer;
  }
}

TEST_P(KvScoreTest, ThreadsDoNotChangeAResult) {
  Random random(48);
  const std::int64_t n = 9000;
  const std::vector<float> logits = random_logits(random, 32 * n);
  const std::vector<float> keys = random.normals(n * 16);
  const auto run = [&](const CpuContext& on, GuardedRows& out) {
    std::vector<float> p = logits;
    window_softmax(on, {p.data(), 32, n});
    const auto row = [&](std::int64_t i) {
      return std::span(out.view().row(i), static_cast<std::size_t>(n));
    };
    window_mean(on, {p.data(), 32, n}, row(0));
    window_max(on, {p.data(), 32, n}, row(1));
    keydiff_scores(on, {keys.data(), n, 16}, row(2));
    out.check();
  };
  GuardedRows here(3, n);
  GuardedRows single(3, n);
  run(context(), here);
  run(*context_with(1), single);
  expect_same_bits(here.view(), single.view());
}

INSTANTIATE_TEST_SUITE_P(Cpu, KvScoreTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
