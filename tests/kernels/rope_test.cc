#include "kernels/rope.h"

#include <limits>

#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

using RopeTest = KernelTest;

std::vector<float> frequencies(int rotary_dim, double base) {
  std::vector<float> inv_freq;
  for (int i = 0; i < rotary_dim / 2; ++i) {
    inv_freq.push_back(static_cast<float>(1.0 / std::pow(base, 2.0 * i / rotary_dim)));
  }
  return inv_freq;
}

TEST(RopeTable, RefusesBadInput) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(RopeTable::create({}, 10).ok());
  EXPECT_FALSE(RopeTable::create(std::vector<float>{1.0F}, 0).ok());
  EXPECT_FALSE(RopeTable::create(std::vector<float>{1.0F}, std::int64_t{1} << 40).ok());
  EXPECT_FALSE(RopeTable::create(std::vector<float>{nan}, 10).ok());
  EXPECT_FALSE(RopeTable::create(std::vector<float>{1.0F}, 10, nan).ok());
}

TEST(RopeTable, AnglesAreRoundedToSinglePrecisionFirst) {
  const std::vector<float> inv_freq = frequencies(64, 10000.0);
  const RopeTable table = RopeTable::create(inv_freq, 8192).value();
  for (const std::int64_t position : {0, 1, 100, 8191}) {
    for (std::size_t i = 0; i < inv_freq.size(); ++i) {
      const float angle = static_cast<float>(position) * inv_freq[i];
      EXPECT_EQ(table.cos(position)[i], std::cos(angle));
      EXPECT_EQ(table.sin(position)[i], std::sin(angle));
    }
  }
}

TEST_P(RopeTest, QuarterTurnByEye) {
  // Angle pi/2 at position 1: (low, high) becomes (-high, low).
  const RopeTable table = RopeTable::create(std::vector<float>{1.5707964F}, 4).value();
  std::vector<float> q = {1, 2, 3, 4};  // one token, two heads of two
  std::vector<float> k = {5, 6};
  rope(context(), table, std::vector<std::int32_t>{1}, 2, {q.data(), 1, 4}, {k.data(), 1, 2});
  EXPECT_THAT(q, testing::Pointwise(testing::FloatNear(1e-6F), {-2.0F, 1.0F, -4.0F, 3.0F}));
  EXPECT_THAT(k, testing::Pointwise(testing::FloatNear(1e-6F), {-6.0F, 5.0F}));
}

TEST_P(RopeTest, MatchesTheReferenceFormulaBitwise) {
  Random random(8);
  for (const int head_dim : {16, 64, 80, 96, 128}) {
    for (const int rotary_dim : {head_dim, head_dim / 2}) {
      const RopeTable table =
          RopeTable::create(frequencies(rotary_dim, 500000.0), 300, 1.1F).value();
      const std::int64_t n = 37;
      GuardedRows q(n, 4 * head_dim);
      GuardedRows k(n, 2 * head_dim);
      std::vector<std::int32_t> positions;
      for (std::int64_t i = 0; i < n; ++i) {
        positions.push_back(static_cast<std::int32_t>(random.below(300)));
        for (const Rows& rows : {q.view(), k.view()}) {
          for (std::int64_t j = 0; j < rows.width; ++j) rows.row(i)[j] = random.normal();
        }
      }
      const GuardedRows before = q;
      rope(context(), table, positions, head_dim, q.view(), k.view());
      q.check();
      k.check();
      const int half = rotary_dim / 2;
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int32_t position = positions[static_cast<std::size_t>(i)];
        for (int j = 0; j < 4 * head_dim; ++j) {
          const int d = j % head_dim;
          float expected = before.at(i, j);
          if (d < half) {
            const float a = before.at(i, j) * table.cos(position)[d];
            const float b = before.at(i, j + half) * table.sin(position)[d];
            expected = a - b;
          } else if (d < rotary_dim) {
            const float a = before.at(i, j) * table.cos(position)[d - half];
            const float b = before.at(i, j - half) * table.sin(position)[d - half];
            expected = a + b;
          }
          ASSERT_EQ(q.at(i, j), expected) << head_dim << " token " << i << " element " << j;
        }
      }
    }
  }
}

TEST_P(RopeTest, NoTokensAndNoKeys) {
  const RopeTable table = RopeTable::create(std::vector<float>{1.0F}, 2).value();
  rope(context(), table, {}, 2, {nullptr, 0, 4}, {nullptr, 0, 2});
  std::vector<float> q = {1, 0};
  rope(context(), table, std::vector<std::int32_t>{1}, 2, {q.data(), 1, 2}, {});
  EXPECT_FLOAT_EQ(q[0], std::cos(1.0F));
  EXPECT_FLOAT_EQ(q[1], std::sin(1.0F));
}

INSTANTIATE_TEST_SUITE_P(Cpu, RopeTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
