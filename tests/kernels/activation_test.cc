#include "kernels/activation.h"

#include <limits>

#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

// |error| <= kTolerance * |exact|: exp to about 1 ulp, a sum, a quotient and a product.
constexpr double kTolerance = 6e-7;

using ActivationTest = KernelTest;

double exact_swiglu(double gate, double up) { return gate / (1.0 + std::exp(-gate)) * up; }

TEST_P(ActivationTest, ByEye) {
  const std::vector<float> gate_up = {0, 1, 30, -200, 5, 2, 2, 7};
  GuardedRows out(1, 4);
  swiglu(context(), {gate_up.data(), 1, 8}, out.view());
  out.check();
  EXPECT_EQ(out.at(0, 0), 0.0F);
  EXPECT_NEAR(out.at(0, 1), 2 * 0.7310585786, 1e-6);
  EXPECT_EQ(out.at(0, 2), 60.0F);
  EXPECT_EQ(out.at(0, 3), 0.0F);
}

TEST_P(ActivationTest, AgainstDoublePrecision) {
  Random random(6);
  for (const std::int64_t inter : {1, 5, 16, 31, 768, 1027}) {
    for (const std::int64_t n : {0, 1, 33}) {
      std::vector<float> x = random.normals(n * 2 * inter);
      for (float& v : x) v *= 6.0F;
      GuardedRows out(n, inter);
      swiglu(context(), {x.data(), n, 2 * inter}, out.view());
      out.check();
      for (std::int64_t i = 0; i < n; ++i) {
        const float* row = x.data() + i * 2 * inter;
        for (std::int64_t j = 0; j < inter; ++j) {
          const double exact = exact_swiglu(row[j], row[inter + j]);
          ASSERT_NEAR(out.at(i, j), exact, kTolerance * std::abs(exact) + 1e-35)
              << "gate " << row[j] << " up " << row[inter + j];
        }
      }
    }
  }
}

TEST_P(ActivationTest, KeepsNaNAndInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {std::nanf(""), infinity, 1, 1};
  std::vector<float> out(2);
  swiglu(context(), {x.data(), 1, 4}, {out.data(), 1, 2});
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], infinity);
}

TEST_P(ActivationTest, RowsDoNotDependOnTheBatch) {
  Random random(7);
  const std::int64_t n = 100;
  const std::int64_t inter = 771;
  const std::vector<float> x = random.normals(n * 2 * inter);
  GuardedRows all(n, inter);
  swiglu(context(), {x.data(), n, 2 * inter}, all.view());
  const auto single = context_with(1);
  for (const std::int64_t i : {0, 49, 50, 99}) {
    GuardedRows one(1, inter);
    swiglu(*single, {x.data() + i * 2 * inter, 1, 2 * inter}, one.view());
    expect_same_bits(one.view(), all.view().rows(i, 1));
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, ActivationTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
