#include "kernels/kv_score.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "kernels/cuda/value_norms.h"
#include "kernels/kv_select.h"
#include "tests/gpu/gpu_fixture.h"
#include "tests/gpu/score_cache.h"

namespace spindle::kernels {
namespace {

using testing::expect_close;
using testing::to_bf16;
using testing::to_f16;
using testing::widened;

std::unique_ptr<CpuContext> make_cpu() {
  auto context = CpuContext::create({.n_threads = 4});
  if (!context.ok()) throw std::runtime_error(context.status().to_string());
  return std::move(*context);
}

class KvScoreCudaTest : public testing::GpuTest {
 protected:
  struct Workspace {
    Workspace(const CudaContext& gpu, std::size_t n_bytes) : bytes(gpu, n_bytes), size(n_bytes) {}
    testing::DeviceVector<std::byte> bytes;
    std::size_t size;
  };

  // The CPU's probabilities of one kv head, rows (head of the group, query).
  static std::vector<float> expected_probabilities(const Cache& cache, const CacheSpec& spec,
                                                   float scale, int h) {
    const auto cpu_context = make_cpu();
    const CpuContext& cpu = *cpu_context;
    const std::int64_t n = cache.n_slots(h);
    const std::int64_t w = spec.n_queries;
    const std::int64_t group = cache.group();
    const std::int64_t d = spec.shape.head_dim;
    std::vector<float> logits(static_cast<std::size_t>(w * group * n));
    const ConstRows q(cache.q().data(), w, spec.shape.n_heads * d);
    attention_logits(cpu, q.columns(h * group * d, group * d), spec.n_tokens, cache.head(h),
                     static_cast<int>(group), cache.layout(), scale, nullptr,
                     Rows(logits.data(), w * group, n));
    std::vector<float> p(logits.size());
    for (std::int64_t g = 0; g < group; ++g) {
      window_softmax(cpu, Rows(logits.data() + g * n, w, n, group * n));
      for (std::int64_t j = 0; j < w; ++j) {
        std::copy_n(logits.data() + (j * group + g) * n, n, p.data() + (g * w + j) * n);
      }
    }
    return p;
  }

  // Random rows that look like probabilities: positive, uneven over many octaves, causal.
  std::vector<float> random_probabilities(const CacheSpec& spec, const Cache& cache,
                                          std::int64_t stride) {
    std::vector<float> p;
    const std::int64_t rows_per_head = std::int64_t{cache.group()} * spec.n_queries;
    for (int h = 0; h < spec.shape.n_kv_heads; ++h) {
      const std::int64_t n = cache.n_slots(h);
      for (std::int64_t row = 0; row < rows_per_head; ++row) {
        const std::int64_t seen = n - spec.n_queries + row % spec.n_queries + 1;
        std::vector<float> values = normal(static_cast<std::size_t>(seen), 2.5F);
        double sum = 0;
        for (float& value : values) sum += value = std::exp(value);
        for (float& value : values) value = static_cast<float>(value / sum);
        values.resize(static_cast<std::size_t>(n), 0.0F);
        values.resize(static_cast<std::size_t>(stride), std::nanf(""));
        p.insert(p.end(), values.begin(), values.end());
      }
    }
    return p;
  }

  void compare_value_norms(ValueNormsPath path);

  std::vector<CacheSpec> specs() {
    std::vector<CacheSpec> specs;
    // Plain prompts of 8B's and the bundled model's groups, one ragged page, one token.
    specs.push_back({{8, 2, 128}, DType::kF16, 700, 32, {{}, {}}});
    specs.push_back({{12, 2, 64}, DType::kF16, 513, 32, {{}, {}}});
    specs.push_back({{4, 1, 64}, DType::kF16, 1, 1, {{}}});
    specs.push_back({{16, 1, 128}, DType::kF16, 96, 32, {{}}});
    specs.push_back({{3, 3, 64}, DType::kF16, 333, 7, {{}, {}, {}}});
    // Blocks, tails that begin late and at different places, a window that reaches tail_first.
    specs.push_back({{8, 2, 128}, DType::kF16, 1500, 32, {{37, 1216, 1221}, {5, 1408, 1468}}});
    specs.push_back({{6, 2, 64}, DType::kF16, 4000, 20, {{90, 3008, 3008}, {0, 64, 131}}});
    specs.push_back({{8, 2, 128}, DType::kBF16, 777, 32, {{11, 448, 450}, {0, 0, 3}}});
    specs.push_back({{4, 2, 64}, DType::kBF16, 300, 32, {{}, {}}});
    specs.push_back({{32, 2, 128}, DType::kF16, 2100, 64, {{}, {}}});
    return specs;
  }
};

TEST_F(KvScoreCudaTest, ProbabilitiesEqualTheCpus) {
  for (const CacheSpec& spec : specs()) {
    SCOPED_TRACE(::testing::Message()
                 << spec.n_tokens << " tokens, head_dim " << spec.shape.head_dim);
    const Cache cache(gpu(), spec, random());
    const float scale = 1.0F / std::sqrt(static_cast<float>(spec.shape.head_dim));
    const std::int64_t stride = score_stride(cache.n_slots());
    const std::int64_t rows_per_head = std::int64_t{cache.group()} * spec.n_queries;
    const DeviceRows p(gpu(), spec.shape.n_heads * std::int64_t{spec.n_queries}, stride);
    const Workspace workspace(gpu(),
                              window_probabilities_workspace_bytes(spec.shape, spec.n_queries));
    window_probabilities(gpu(), cache.layer(), scale, workspace.bytes.data(), workspace.size,
                         p.view());
    workspace.bytes.check_guard();
    const std::vector<float> actual = p.to_host();
    for (int h = 0; h < spec.shape.n_kv_heads; ++h) {
      const std::vector<float> expected = expected_probabilities(cache, spec, scale, h);
      const std::int64_t n = cache.n_slots(h);
      for (std::int64_t row = 0; row < rows_per_head; ++row) {
        const float* from = actual.data() + (h * rows_per_head + row) * stride;
        // Logits of size 10 in fp32, of the same 16-bit inputs; bf16 pages take the queries as two
        // bf16 terms, 2^-17 of each factor.
        const float relative = spec.dtype == DType::kF16 ? 3e-5F : 2e-4F;
        expect_close({from, static_cast<std::size_t>(n)},
                     {expected.data() + row * n, static_cast<std::size_t>(n)}, 1e-9F, relative,
                     "head " + std::to_string(h) + " row " + std::to_string(row));
        if (HasFatalFailure()) return;
        for (std::int64_t t = n; t < stride; ++t) {
          ASSERT_TRUE(is_poison(from[t])) << "written past the slots at " << t;
        }
      }
    }
  }
}

TEST_F(KvScoreCudaTest, ANanKeyMakesTheRowsThatSeeItNan) {
  CacheSpec spec{{4, 2, 64}, DType::kF16, 100, 32, {{}, {}}};
  spec.nan_position = 90;  // the queries 68 .. 99 see it from row 22 on
  const Cache cache(gpu(), spec, random());
  const std::int64_t stride = score_stride(cache.n_slots());
  const DeviceRows p(gpu(), 4 * 32, stride);
  const Workspace workspace(gpu(), window_probabilities_workspace_bytes(spec.shape, 32));
  window_probabilities(gpu(), cache.layer(), 0.125F, workspace.bytes.data(), workspace.size,
                       p.view());
  const std::vector<float> actual = p.to_host();
  for (std::int64_t row = 0; row < 4 * 32; ++row) {
    const bool broken = row < 2 * 32 && row % 32 >= 22;
    const std::int64_t seen = 68 + row % 32 + 1;
    for (std::int64_t t = 0; t < 100; ++t) {
      const float value = actual[static_cast<std::size_t>(row * stride + t)];
      if (t >= seen) {
        ASSERT_EQ(value, 0.0F);
      } else {
        ASSERT_EQ(std::isnan(value), broken) << "row " << row << " column " << t;
      }
    }
  }
}

TEST_F(KvScoreCudaTest, ColumnScoresEqualTheCpus) {
  const auto cpu_context = make_cpu();
  const CpuContext& cpu = *cpu_context;
  for (const CacheSpec& spec : specs()) {
    SCOPED_TRACE(::testing::Message() << spec.n_tokens << " tokens");
    const Cache cache(gpu(), spec, random());
    const std::int64_t stride = score_stride(cache.n_slots());
    const std::int64_t w = spec.n_queries;
    const std::vector<float> p = random_probabilities(spec, cache, stride);
    const DeviceRows device_p(gpu(), p, stride);
    const DeviceRows mean(gpu(), spec.shape.n_heads, stride);
    window_mean(gpu(), cache.layer(), device_p.view(), mean.view());
    const DeviceRows snap_mean(gpu(), spec.shape.n_kv_heads, stride);
    const DeviceRows snap_max(gpu(), spec.shape.n_kv_heads, stride);
    snapkv_scores(gpu(), cache.layer(), mean.view(), GroupReduce::kMean, snap_mean.view());
    snapkv_scores(gpu(), cache.layer(), mean.view(), GroupReduce::kMax, snap_max.view());
    const auto n_heads = static_cast<std::size_t>(spec.shape.n_heads);
    const testing::DeviceVector<float> decode(gpu(), n_heads);
    const testing::DeviceVector<float> prefill(gpu(), n_heads);
    const std::int64_t window = 150;
    lazy_mass(gpu(), cache.layer(), device_p.view(), 4, window, true, decode.data());
    lazy_mass(gpu(), cache.layer(), device_p.view(), 4, window, false, prefill.data());
    const std::vector<float> actual_mean = mean.to_host();
    const std::vector<float> actual_decode = decode.to_host();
    const std::vector<float> actual_prefill = prefill.to_host();
    for (int head = 0; head < spec.shape.n_heads; ++head) {
      const std::int64_t n = cache.n_slots(head / cache.group());
      const ConstRows rows(p.data() + head * w * stride, w, n, stride);
      std::vector<float> expected(static_cast<std::size_t>(n));
      window_mean(cpu, rows, expected);
      const float* from = actual_mean.data() + head * stride;
      expect_close({from, expected.size()}, expected, 0.0F, 3e-6F, "mean");
      for (std::int64_t t = n; t < stride; ++t) ASSERT_TRUE(is_poison(from[t]));
      const auto at = static_cast<std::size_t>(head);
      EXPECT_NEAR(actual_decode[at], lazy_mass_decode(rows, 4, window), 1e-6);
      EXPECT_NEAR(actual_prefill[at], lazy_mass_prefill(rows, 4, window), 1e-6);
    }
    const std::vector<float> actual_snap[] = {snap_mean.to_host(), snap_max.to_host()};
    for (int h = 0; h < spec.shape.n_kv_heads; ++h) {
      const std::int64_t n = cache.n_slots(h);
      const ConstRows means(actual_mean.data() + h * cache.group() * stride, cache.group(), n,
                            stride);
      for (int max = 0; max < 2; ++max) {
        std::vector<float> expected(static_cast<std::size_t>(n - w));
        snapkv_scores(means, static_cast<int>(w), max == 1 ? GroupReduce::kMax : GroupReduce::kMean,
                      expected);
        expect_close({actual_snap[max].data() + h * stride, expected.size()}, expected, 0.0F, 1e-6F,
                     "snapkv");
      }
    }
    if (HasFatalFailure()) return;
  }
}

TEST_F(KvScoreCudaTest, KeyDiffEqualsTheCpus) {
  const auto cpu_context = make_cpu();
  const CpuContext& cpu = *cpu_context;
  for (CacheSpec spec : specs()) {
    SCOPED_TRACE(::testing::Message() << spec.n_tokens << " tokens");
    const bool broken = spec.n_tokens == 700;
    if (broken) spec.nan_position = 123;
    const Cache cache(gpu(), spec, random());
    const std::int64_t stride = score_stride(cache.n_slots());
    const DeviceRows scores(gpu(), spec.shape.n_kv_heads, stride);
    const Workspace workspace(gpu(), keydiff_workspace_bytes(spec.shape));
    keydiff_scores(gpu(), cache.layer(), workspace.bytes.data(), workspace.size, scores.view());
    workspace.bytes.check_guard();
    std::vector<float> actual = scores.to_host();
    for (int h = 0; h < spec.shape.n_kv_heads; ++h) {
      const std::int64_t first = cache.head(h).tail_first;
      const std::vector<float> keys = cache.tail(h, first, KvSide::kKey);
      std::vector<float> expected(static_cast<std::size_t>(spec.n_tokens - first));
      keydiff_scores(cpu, ConstRows(keys.data(), spec.n_tokens - first, spec.shape.head_dim),
                     expected);
      float* from = actual.data() + h * stride;
      if (broken && h == 0) {
        EXPECT_TRUE(std::isnan(from[123]));
        ASSERT_TRUE(std::isnan(expected[123]));
        from[123] = expected[123] = 0.0F;
      }
      // Cosines: fp32 sums of head_dim products.
      expect_close({from, expected.size()}, expected, 5e-6F, 0.0F, "keydiff");
      for (std::int64_t t = spec.n_tokens - first; t < stride; ++t) ASSERT_TRUE(is_poison(from[t]));
    }
    if (HasFatalFailure()) return;
  }
}

// Kept sets of select_top_k over all heads agree but for neighbours of the threshold.
void expect_same_kept(std::span<const float> actual, std::span<const float> expected,
                      std::int64_t k) {
  const std::vector<std::int32_t> kept = select_top_k(actual, k);
  const std::vector<std::int32_t> wanted = select_top_k(expected, k);
  if (wanted.empty()) return;
  float threshold = INFINITY;
  for (const std::int32_t t : wanted) {
    threshold = std::min(threshold, expected[static_cast<std::size_t>(t)]);
  }
  for (const std::int32_t t : kept) {
    if (std::binary_search(wanted.begin(), wanted.end(), t)) continue;
    EXPECT_NEAR(expected[static_cast<std::size_t>(t)], threshold, 1e-4F * threshold)
        << "kept " << t << " of " << k;
  }
}

TEST_F(KvScoreCudaTest, DefensiveScoresEqualTheCpus) {
  const auto cpu_context = make_cpu();
  const CpuContext& cpu = *cpu_context;
  for (const CacheSpec& spec : specs()) {
    SCOPED_TRACE(::testing::Message() << spec.n_tokens << " tokens");
    const Cache cache(gpu(), spec, random());
    const std::int64_t stride = score_stride(cache.n_slots());
    const std::int64_t w = spec.n_queries;
    const float scale = 1.0F / std::sqrt(static_cast<float>(spec.shape.head_dim));
    const auto n_heads = static_cast<std::size_t>(spec.shape.n_kv_heads);
    std::int64_t first = 0;
    for (const HeadSpec& head : spec.heads) first = std::max<std::int64_t>(first, head.tail_first);
    const std::int64_t n_norms = spec.n_tokens - first;
    std::vector<float> norms = normal(n_heads * static_cast<std::size_t>(stride));
    for (float& norm : norms) norm = 0.3F + 0.1F * std::fabs(norm);

    const DeviceRows device_norms(gpu(), norms, stride);
    const DeviceRows scores(gpu(), spec.shape.n_kv_heads, stride);
    const DeviceRows means(gpu(), spec.shape.n_kv_heads, stride);
    const std::int64_t n_rows = spec.shape.n_heads * w;
    const testing::DeviceVector<float> window_mass(gpu(), static_cast<std::size_t>(n_rows));
    const testing::DeviceVector<float> best(gpu(), 1);
    const Workspace workspace(gpu(), defensive_workspace_bytes(spec.shape, spec.n_queries));
    const DeviceDefensive out{scores.view(), means.view(), window_mass.data(), best.data()};
    defensive_scores(gpu(), cache.layer(), scale, device_norms.view(), first,
                     workspace.bytes.data(), workspace.size, out);
    workspace.bytes.check_guard();
    const std::vector<float> actual = scores.to_host();
    const std::vector<float> actual_means = means.to_host();
    const std::vector<float> actual_mass = window_mass.to_host();
    const float actual_best = best.to_host().front();

    // As the probabilities, pooled and multiplied.
    const float relative = spec.dtype == DType::kF16 ? 5e-5F : 4e-4F;
    float expected_best = 0.0F;
    for (int h = 0; h < spec.shape.n_kv_heads; ++h) {
      const std::int64_t n = cache.n_slots(h);
      const std::vector<float> p = expected_probabilities(cache, spec, scale, h);
      std::vector<float> score(static_cast<std::size_t>(n - w));
      std::vector<float> mean(score.size());
      std::vector<float> head_norms(static_cast<std::size_t>(n));
      std::copy_n(norms.data() + h * stride, n_norms, head_norms.data() + n - n_norms);
      DefensiveHead head{score, mean, 0.0F};
      defensive_scores(cpu, ConstRows(p.data(), cache.group() * w, n), cache.group(),
                       static_cast<int>(w), head_norms, head);
      for (const float value : score) expected_best = std::max(expected_best, value);
      const std::string name = "head " + std::to_string(h);
      expect_close({actual.data() + h * stride, score.size()}, score, 0.0F, relative, name);
      expect_close({actual_means.data() + h * stride, mean.size()}, mean, 0.0F, relative,
                   name + " mean");
      double mass = 0;
      for (std::int64_t row = 0; row < cache.group() * w; ++row) {
        mass +=
            static_cast<double>(actual_mass[static_cast<std::size_t>(h * cache.group() * w + row)]);
      }
      EXPECT_NEAR(mass / static_cast<double>(cache.group() * w), head.window_mass, 1e-4);
      for (const double share : {0.05, 0.25, 0.6}) {
        expect_same_kept({actual.data() + h * stride, score.size()}, score,
                         static_cast<std::int64_t>(share * static_cast<double>(score.size())));
      }
      for (std::int64_t t = n - w; t < stride; ++t) {
        ASSERT_TRUE(is_poison(actual[static_cast<std::size_t>(h * stride + t)]));
        ASSERT_TRUE(is_poison(actual_means[static_cast<std::size_t>(h * stride + t)]));
      }
    }
    EXPECT_NEAR(actual_best, expected_best, relative * expected_best);
    if (HasFailure()) return;
  }
}

// The boost of heads of two layers in one call, against the CPU's of each layer.
TEST_F(KvScoreCudaTest, TheBoostEqualsTheCpus) {
  const std::vector<std::size_t> sizes = {700, 4096, 1, 12345, 31, 100000};
  constexpr std::size_t kHeadsPerLayer = 3;
  for (const std::int64_t max_boosted : {1, 20, 3000, 1000000}) {
    for (const bool ties : {false, true}) {
      SCOPED_TRACE(::testing::Message() << "at most " << max_boosted << (ties ? ", ties" : ""));
      std::vector<std::vector<float>> scores;
      std::vector<std::vector<float>> means;
      for (const std::size_t n : sizes) {
        scores.push_back(normal(n));
        means.push_back(normal(n, 2.0F));
        for (float& score : scores.back()) score = std::fabs(score) * 1e-3F;
        // Few values, zeros among them, or many octaves.
        for (float& mean : means.back()) {
          mean = ties ? std::ldexp(static_cast<float>(uniform_int(0, 2)), -12)
                      : std::exp(mean) / static_cast<float>(n);
        }
      }
      // Per layer: the window's mass of each row, the highest score.
      std::vector<std::vector<float>> window_mass;
      std::vector<float> best;
      for (std::size_t layer = 0; layer < 2; ++layer) {
        window_mass.emplace_back(64, layer == 0 ? 0.125F : 0.5F);
        best.push_back(0.0F);
        for (std::size_t h = 0; h < kHeadsPerLayer; ++h) {
          for (const float score : scores[layer * kHeadsPerLayer + h]) {
            best.back() = std::max(best.back(), score);
          }
        }
      }
      std::vector<std::unique_ptr<testing::DeviceVector<float>>> device_scores;
      std::vector<std::unique_ptr<testing::DeviceVector<float>>> device_means;
      const auto mass0 = upload(window_mass[0]);
      const auto mass1 = upload(window_mass[1]);
      const auto device_best = upload(best);
      std::vector<DeviceBoostHead> heads;
      for (std::size_t h = 0; h < sizes.size(); ++h) {
        device_scores.push_back(std::make_unique<testing::DeviceVector<float>>(gpu(), scores[h]));
        device_means.push_back(std::make_unique<testing::DeviceVector<float>>(gpu(), means[h]));
        const std::size_t layer = h / kHeadsPerLayer;
        heads.push_back({device_scores[h]->data(), device_means[h]->data(),
                         layer == 0 ? mass0.data() : mass1.data(), device_best.data() + layer,
                         static_cast<std::int32_t>(sizes[h]), 64});
      }
      const auto device_heads = upload(heads);
      defensive_boost(gpu(), device_heads.data(), static_cast<int>(heads.size()), max_boosted);
      for (std::size_t layer = 0; layer < 2; ++layer) {
        std::vector<DefensiveHead> expected;
        for (std::size_t h = layer * kHeadsPerLayer; h < (layer + 1) * kHeadsPerLayer; ++h) {
          expected.push_back({scores[h], means[h], window_mass[layer][0]});
        }
        defensive_boost(expected, max_boosted);
      }
      for (std::size_t h = 0; h < sizes.size(); ++h) {
        const std::vector<float> actual = device_scores[h]->to_host();
        // The CPU adds a hundred thousand means up one by one: where it ends may differ by a token.
        std::size_t n_other = 0;
        for (std::size_t t = 0; t < sizes[h]; ++t) {
          ASSERT_TRUE(std::isfinite(actual[t]));
          if (std::fabs(actual[t] - scores[h][t]) > 1e-6F * scores[h][t]) ++n_other;
        }
        EXPECT_LE(n_other, ties ? 0U : 1U) << "head " << h;
      }
    }
  }
}

void KvScoreCudaTest::compare_value_norms(ValueNormsPath path) {
  const auto cpu_context = make_cpu();
  const CpuContext& cpu = *cpu_context;
  for (const CacheSpec& spec : specs()) {
    for (const std::int64_t hidden : {200, 512}) {
      SCOPED_TRACE(::testing::Message() << spec.n_tokens << " tokens, hidden " << hidden);
      const Cache cache(gpu(), spec, random());
      std::int64_t first = 0;
      for (const HeadSpec& head : spec.heads)
        first = std::max<std::int64_t>(first, head.tail_first);
      const std::int64_t n = spec.n_tokens - first;
      const std::int64_t d = spec.shape.head_dim;
      const std::int64_t kv_width = spec.shape.n_kv_heads * d;
      std::vector<float> v(static_cast<std::size_t>(n * kv_width));
      for (int h = 0; h < spec.shape.n_kv_heads; ++h) {
        const std::vector<float> tail = cache.tail(h, first, KvSide::kValue);
        for (std::int64_t t = 0; t < n; ++t) {
          std::copy_n(tail.data() + t * d, d, v.data() + t * kv_width + h * d);
        }
      }
      const std::int64_t q_width = spec.shape.n_heads * d;
      const std::vector<Bf16> weights =
          to_bf16(normal(static_cast<std::size_t>(hidden * q_width), 0.02F));
      const WeightSource source[] = {{weights.data(), DType::kBF16, hidden}};
      auto packed = PackedLinear::pack(cpu, source, q_width);
      ASSERT_TRUE(packed.ok()) << packed.status().to_string();
      std::vector<float> expected(static_cast<std::size_t>(spec.shape.n_kv_heads * n));
      const Rows expected_rows(expected.data(), spec.shape.n_kv_heads, n);
      value_output_norms(cpu, *packed, ConstRows(v.data(), n, kv_width), spec.shape.n_heads,
                         spec.shape.n_kv_heads, expected_rows);
      normalize_value_norms(expected_rows);

      const auto device_weights = upload(weights);
      const std::int64_t stride = score_stride(cache.n_slots());
      const Workspace workspace(gpu(), value_output_norms_workspace_bytes(spec.shape, hidden));
      const DeviceRows norms(gpu(), spec.shape.n_kv_heads, stride);
      value_output_norms(gpu(), cache.layer(), device_weights.data(), hidden, first,
                         workspace.bytes.data(), workspace.size, path, norms.view());
      workspace.bytes.check_guard();
      const std::vector<float> actual = norms.to_host();
      for (int h = 0; h < spec.shape.n_kv_heads; ++h) {
        // Sums of thousands of absolute values in fp32, of the same 16-bit inputs.
        expect_close({actual.data() + h * stride, static_cast<std::size_t>(n)},
                     {expected.data() + h * n, static_cast<std::size_t>(n)}, 0.0F, 2e-5F,
                     path == ValueNormsPath::kMma ? "mma" : "best");
        for (std::int64_t t = n; t < stride; ++t) {
          ASSERT_TRUE(is_poison(actual[static_cast<std::size_t>(h * stride + t)]));
        }
      }
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(KvScoreCudaTest, ValueNormsByMmaEqualTheCpus) { compare_value_norms(ValueNormsPath::kMma); }

// The last case: a kernel that waits forever would take the others with it.
TEST_F(KvScoreCudaTest, ValueNormsEqualTheCpus) { compare_value_norms(ValueNormsPath::kBest); }

}  // namespace
}  // namespace spindle::kernels
