#include "kernels/norm.h"

#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

// |error| <= kTolerance * |exact|: a mean over up to 4096 squares, a root and two products.
constexpr double kTolerance = 2e-6;

using NormTest = KernelTest;

TEST_P(NormTest, ByEye) {
  // mean(x^2) = (9 + 16) / 2 = 12.5; with eps 3.5 the root is 4.
  const std::vector<float> x = {3, 4};
  const std::vector<float> weight = {1, 2};
  GuardedRows out(1, 2);
  rms_norm(context(), {x.data(), 1, 2}, weight, 3.5F, out.view());
  out.check();
  EXPECT_EQ(out.at(0, 0), 0.75F);
  EXPECT_EQ(out.at(0, 1), 2.0F);
}

TEST_P(NormTest, AgainstDoublePrecision) {
  Random random(2);
  for (const std::int64_t hidden : {1, 7, 16, 33, 64, 100, 256, 1000, 4096}) {
    for (const std::int64_t n : {0, 1, 5, 70}) {
      const std::vector<float> x = random.normals(n * hidden);
      const std::vector<float> weight = random.normals(hidden);
      GuardedRows out(n, hidden);
      rms_norm(context(), {x.data(), n, hidden}, weight, 1e-5F, out.view());
      out.check();
      for (std::int64_t i = 0; i < n; ++i) {
        const float* row = x.data() + i * hidden;
        double sum = 0;
        for (std::int64_t j = 0; j < hidden; ++j) sum += double{row[j]} * double{row[j]};
        const double scale = 1.0 / std::sqrt(sum / static_cast<double>(hidden) + double{1e-5F});
        for (std::int64_t j = 0; j < hidden; ++j) {
          const double exact = double{row[j]} * scale * double{weight[static_cast<std::size_t>(j)]};
          ASSERT_NEAR(out.at(i, j), exact, kTolerance * std::abs(exact)) << hidden << " " << i;
        }
      }
    }
  }
}

TEST_P(NormTest, FusedAddEqualsAddThenNorm) {
  Random random(3);
  const std::int64_t n = 40;
  const std::int64_t hidden = 260;
  const std::vector<float> x = random.normals(n * hidden);
  const std::vector<float> start = random.normals(n * hidden);
  const std::vector<float> weight = random.normals(hidden);
  const ConstRows view{x.data(), n, hidden};
  std::vector<float> a = start;
  std::vector<float> b = start;
  GuardedRows fused(n, hidden);
  GuardedRows apart(n, hidden);
  add_rms_norm(context(), view, {a.data(), n, hidden}, weight, 1e-6F, fused.view());
  residual_add(context(), view, {b.data(), n, hidden});
  rms_norm(context(), Rows{b.data(), n, hidden}, weight, 1e-6F, apart.view());
  fused.check();
  apart.check();
  expect_same_bits(fused.view(), apart.view());
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i], start[i] + x[i]);
    ASSERT_EQ(a[i], b[i]);
  }
}

TEST_P(NormTest, RowsDoNotDependOnTheBatch) {
  Random random(4);
  const std::int64_t n = 600;
  const std::int64_t hidden = 257;
  const std::vector<float> x = random.normals(n * hidden);
  const std::vector<float> weight = random.normals(hidden);
  GuardedRows all(n, hidden);
  rms_norm(context(), {x.data(), n, hidden}, weight, 1e-5F, all.view());
  const auto single = context_with(1);
  for (const std::int64_t i : {0, 1, 299, 300, 599}) {
    GuardedRows one(1, hidden);
    rms_norm(*single, {x.data() + i * hidden, 1, hidden}, weight, 1e-5F, one.view());
    expect_same_bits(one.view(), all.view().rows(i, 1));
  }
}

TEST_P(NormTest, InPlace) {
  Random random(5);
  const std::int64_t hidden = 100;
  std::vector<float> x = random.normals(2 * hidden);
  const std::vector<float> weight = random.normals(hidden);
  GuardedRows out(2, hidden);
  rms_norm(context(), {x.data(), 2, hidden}, weight, 1e-5F, out.view());
  const Rows own{x.data(), 2, hidden};
  rms_norm(context(), own, weight, 1e-5F, own);
  expect_same_bits(out.view(), own);
}

INSTANTIATE_TEST_SUITE_P(Cpu, NormTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
