#include "kernels/sample.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using SampleTest = KernelTest;

// Naive: sort everything, double precision.
struct Oracle {
  std::vector<std::int32_t> ids;      // kept, best first
  std::vector<double> probabilities;  // of those, summing to 1

  Oracle(const std::vector<float>& logits, const SampleParams& params) {
    std::vector<std::int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    const auto logit = [&](std::int32_t id) { return logits[static_cast<std::size_t>(id)]; };
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return logit(a) > logit(b); });
    if (params.top_k > 0)
      order.resize(std::min(order.size(), static_cast<std::size_t>(params.top_k)));
    std::vector<double> p;
    for (const std::int32_t id : order) {
      p.push_back(
          std::exp((double{logit(id)} - double{logit(order[0])}) / double{params.temperature}));
    }
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    double before = 0.0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      if (before < double{params.top_p} * total && p[i] >= double{params.min_p}) {
        ids.push_back(order[i]);
        probabilities.push_back(p[i]);
      }
      before += p[i];
    }
    const double kept = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
    for (double& value : probabilities) value /= kept;
  }
};

TEST_P(SampleTest, ArgmaxPrefersTheLowerIdAndIgnoresNaN) {
  EXPECT_EQ(argmax(context(), std::vector<float>{1, 3, 2, 3}), 1);
  EXPECT_EQ(argmax(context(), std::vector<float>{-kInfinity, -5}), 1);
  EXPECT_EQ(argmax(context(), std::vector<float>{std::nanf(""), -5, -4}), 2);
  EXPECT_EQ(argmax(context(), std::vector<float>{-kInfinity, -kInfinity}), -1);
  EXPECT_EQ(argmax(context(), {}), -1);
  std::vector<float> many(1000, 0.5F);
  many[700] = many[900] = 2.0F;
  EXPECT_EQ(argmax(context(), many), 700);
}

TEST_P(SampleTest, PenaltiesByEye) {
  // ids: 0 in prompt, 1 in output twice, 2 in both, 3 nowhere, 4 negative and in the prompt.
  std::vector<float> logits = {4, 4, 4, 4, -4};
  SampleWorkspace workspace;
  SampleParams params;
  params.repetition_penalty = 2.0F;
  params.presence_penalty = 0.5F;
  params.frequency_penalty = 0.25F;
  const std::vector<std::int32_t> prompt = {0, 2, 4, 0, 99, -1};
  const std::vector<std::int32_t> output = {1, 2, 1};
  SampleHistory history;
  history.prompt_ids = prompt;
  history.output_ids = output;
  for (int repeat = 0; repeat < 2; ++repeat) {
    std::vector<float> row = logits;
    apply_penalties(row, params, history, workspace);
    EXPECT_THAT(row, testing::ElementsAre(2, 2 - 0.5F - 0.5F, 2 - 0.5F - 0.25F, 4, -8));
  }
  params.repetition_penalty = 1.0F;
  std::vector<float> row = logits;
  apply_penalties(row, params, history, workspace);
  EXPECT_THAT(row, testing::ElementsAre(4, 3, 3.25F, 4, -4));
}

TEST_P(SampleTest, BiasAndMaskByEye) {
  std::vector<float> logits = {1, 2, 3};
  apply_bias(logits, std::vector<LogitBias>{{0, 5}, {7, 1}, {-3, 1}, {0, 1}});
  apply_mask(logits, std::vector<std::int32_t>{2, 3, -1});
  EXPECT_THAT(logits, testing::ElementsAre(7, 2, -kInfinity));
}

TEST_P(SampleTest, CutsByEye) {
  // Probabilities 0.4, 0.3, 0.2, 0.1 at ids 2, 0, 3, 1.
  const std::vector<float> logits = {std::log(0.3F), std::log(0.1F), std::log(0.4F),
                                     std::log(0.2F)};
  SampleWorkspace workspace;
  const auto support = [&](const SampleParams& params) {
    std::vector<std::int32_t> seen;
    for (int i = 0; i < 1000; ++i) {
      const std::int32_t id = draw(context(), logits, params, (i + 0.5) / 1000, workspace);
      if (std::find(seen.begin(), seen.end(), id) == seen.end()) seen.push_back(id);
    }
    std::sort(seen.begin(), seen.end());
    return seen;
  };
  EXPECT_THAT(support({}), testing::ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(support({.top_k = 2}), testing::ElementsAre(0, 2));
  EXPECT_THAT(support({.top_p = 0.65F}), testing::ElementsAre(0, 2));
  EXPECT_THAT(support({.top_p = 0.75F}), testing::ElementsAre(0, 2, 3));
  EXPECT_THAT(support({.top_p = 1e-6F}), testing::ElementsAre(2));
  EXPECT_THAT(support({.min_p = 0.4F}), testing::ElementsAre(0, 2, 3));
  EXPECT_THAT(support({.top_k = 3, .top_p = 0.5F}), testing::ElementsAre(0, 2));
  EXPECT_THAT(support({.top_k = 3, .min_p = 0.7F}), testing::ElementsAre(0, 2));
  EXPECT_THAT(support({.temperature = 0.0F}), testing::ElementsAre(2));
  EXPECT_THAT(support({.temperature = 1e-40F}), testing::ElementsAre(2));
}

TEST_P(SampleTest, TiesKeepTheLowerIds) {
  const std::vector<float> logits(5000, 1.0F);
  SampleWorkspace workspace;
  for (const double uniform : {0.0, 0.49, 0.51, 0.999999}) {
    EXPECT_EQ(draw(context(), logits, {.top_k = 2}, uniform, workspace), uniform < 0.5 ? 0 : 1);
  }
  EXPECT_EQ(draw(context(), logits, {.top_p = 0.5F}, 0.9999999, workspace), 2499);
}

TEST_P(SampleTest, RefusesRowsWithoutADistribution) {
  SampleWorkspace workspace;
  for (const SampleParams& params :
       {SampleParams{}, SampleParams{.top_k = 1}, SampleParams{.top_p = 0.5F},
        SampleParams{.temperature = 0.0F}}) {
    EXPECT_EQ(draw(context(), std::vector<float>{1, std::nanf(""), 0}, params, 0.5, workspace), -1);
    EXPECT_EQ(draw(context(), std::vector<float>(3, -kInfinity), params, 0.5, workspace), -1);
    EXPECT_EQ(draw(context(), std::vector<float>{1, kInfinity, 0}, params, 0.5, workspace), 1);
    EXPECT_EQ(draw(context(), std::vector<float>{-kInfinity, -3e38F}, params, 0.999, workspace), 1);
  }
}

// Every u picks the token whose interval of the naive cumulative distribution holds it, give or
// take rounding at the borders: with sorted cuts in rank order, without them in id order.
TEST_P(SampleTest, DrawsFollowTheCumulativeDistribution) {
  Random random(30);
  SampleWorkspace workspace;
  for (const std::int64_t n_vocab : {7, 600, 20000}) {
    std::vector<float> logits = random.normals(n_vocab);
    for (float& value : logits) value *= 3.0F;
    for (const SampleParams& params :
         {SampleParams{}, SampleParams{.temperature = 0.6F, .min_p = 0.05F},
          SampleParams{.temperature = 0.7F, .top_k = 50},
          SampleParams{.temperature = 1.3F, .top_p = 0.9F},
          SampleParams{.temperature = 5.0F, .top_p = 0.99F},
          SampleParams{.temperature = 0.9F, .top_k = 5000, .top_p = 0.95F, .min_p = 0.01F}}) {
      Oracle oracle(logits, params);
      const bool ranked = (params.top_k > 0 && params.top_k < n_vocab) || params.top_p < 1.0F;
      std::vector<std::size_t> order(oracle.ids.size());
      std::iota(order.begin(), order.end(), 0U);
      if (!ranked) {
        std::sort(order.begin(), order.end(),
                  [&](std::size_t a, std::size_t b) { return oracle.ids[a] < oracle.ids[b]; });
      }
      double cumulative = 0.0;
      std::int64_t checked = 0;
      for (const std::size_t i : order) {
        const double p = oracle.probabilities[i];
        if (p > 1e-4 && checked < 25) {
          ASSERT_EQ(draw(context(), logits, params, cumulative + p / 2, workspace), oracle.ids[i])
              << "vocabulary " << n_vocab << " top_k " << params.top_k << " top_p " << params.top_p;
          ++checked;
        }
        cumulative += p;
      }
      EXPECT_GT(checked, 0);
    }
  }
}

// Chi-square of 20,000 keyed draws over 8 tokens: 7 degrees of freedom, 24.3 is the 0.1 % point.
// The keys are fixed, so this either always passes or never.
TEST_P(SampleTest, KeyedDrawsHaveTheRightFrequencies) {
  const std::vector<float> logits = {0, 1, 2, -1, 0.5F, 1.5F, -2, 0};
  const Oracle oracle(logits, {});
  SampleWorkspace workspace;
  std::vector<int> hits(8);
  constexpr int kDraws = 20000;
  for (std::uint32_t i = 0; i < kDraws; ++i) {
    const SampleKey key{.seed = 1234, .request = i / 100, .choice = i % 2, .position = i % 100};
    const std::int32_t id = sample(context(), logits, {}, {}, key, workspace);
    ASSERT_GE(id, 0);
    ++hits[static_cast<std::size_t>(id)];
  }
  double chi_square = 0.0;
  for (std::size_t i = 0; i < oracle.ids.size(); ++i) {
    const double expected = kDraws * oracle.probabilities[i];
    const double off = hits[static_cast<std::size_t>(oracle.ids[i])] - expected;
    chi_square += off * off / expected;
  }
  EXPECT_LT(chi_square, 24.3);
}

TEST(SampleKey, EveryFieldMatters) {
  const SampleKey base{.seed = 1, .request = 2, .choice = 3, .position = 4};
  EXPECT_EQ(sample_uniform(base), sample_uniform(base));
  std::vector<SampleKey> others(6, base);
  others[0].seed = 5;
  others[1].seed += std::uint64_t{1} << 32;
  others[2].request = 5;
  others[3].request += std::uint64_t{1} << 32;
  others[4].choice = 5;
  others[5].position = 5;
  for (const SampleKey& other : others) EXPECT_NE(sample_uniform(base), sample_uniform(other));
}

TEST_P(SampleTest, StepsRunInOrder) {
  // Penalties, then bias, then mask: id 1 is lifted by its bias but banned, id 2 loses its lead to
  // the repetition penalty, id 0 wins.
  const std::vector<float> logits = {3, 1, 5};
  const std::vector<std::int32_t> prompt = {2};
  const std::vector<LogitBias> bias = {{1, 100}};
  const std::vector<std::int32_t> banned = {1};
  SampleHistory history;
  history.prompt_ids = prompt;
  history.logit_bias = bias;
  history.banned_ids = banned;
  SampleWorkspace workspace;
  const SampleParams params{.temperature = 0.0F, .repetition_penalty = 2.0F};
  EXPECT_EQ(sample(context(), logits, params, history, {}, workspace), 0);
  EXPECT_THAT(logits, testing::ElementsAre(3, 1, 5));
}

TEST_P(SampleTest, LogProbabilitiesAgainstDoublePrecision) {
  Random random(31);
  SampleWorkspace workspace;
  for (const std::int64_t n_vocab : {1, 5, 300, 4096, 152000}) {
    std::vector<float> logits = random.normals(n_vocab);
    for (float& value : logits) value = value * 4.0F + 20.0F;
    if (n_vocab > 10) logits[3] = logits[7] = 50.0F;
    double sum = 0.0;
    for (const float value : logits) sum += std::exp(double{value});
    const double exact = std::log(sum);
    EXPECT_NEAR(log_sum_exp(context(), logits), exact, 2e-6 * exact) << n_vocab;

    const std::vector<std::int32_t> ids = {0, static_cast<std::int32_t>(n_vocab - 1)};
    std::vector<TokenLogprob> chosen(2);
    log_softmax_at(context(), logits, ids, chosen);
    for (std::size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(chosen[i].id, ids[i]);
      EXPECT_NEAR(chosen[i].logprob, double{logits[static_cast<std::size_t>(ids[i])]} - exact,
                  1e-4);
    }

    const std::size_t count = static_cast<std::size_t>(std::min<std::int64_t>(20, n_vocab));
    std::vector<TokenLogprob> top(count);
    ASSERT_EQ(top_logprobs(context(), logits, top, workspace), count);
    std::vector<std::int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
    });
    for (std::size_t i = 0; i < count; ++i) {
      EXPECT_EQ(top[i].id, order[i]) << "rank " << i << " of " << n_vocab;
      EXPECT_NEAR(top[i].logprob, double{logits[static_cast<std::size_t>(order[i])]} - exact, 1e-4);
    }
  }
}

TEST_P(SampleTest, LogProbabilitiesOfOddRows) {
  EXPECT_EQ(log_sum_exp(context(), std::vector<float>{-kInfinity, 2, -kInfinity}), 2.0F);
  EXPECT_TRUE(std::isnan(log_sum_exp(context(), std::vector<float>{1, std::nanf("")})));
  SampleWorkspace workspace;
  EXPECT_EQ(top_logprobs(context(), std::vector<float>{1}, {}, workspace), 0U);
  std::vector<TokenLogprob> out(3);
  EXPECT_EQ(top_logprobs(context(), std::vector<float>{1, 2}, out, workspace), 2U);
  EXPECT_EQ(out[0].id, 1);
}

INSTANTIATE_TEST_SUITE_P(Cpu, SampleTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
