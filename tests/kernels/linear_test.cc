#include "kernels/linear.h"

#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {
namespace {

using LinearTest = KernelTest;

// An fp32 chain of n terms, against sum |x w| (a random-walk bound with room, not n * 2^-24).
double chain_tolerance(std::int64_t n) { return 4.0 * 0x1p-24 * std::sqrt(static_cast<double>(n)); }

struct Weights {
  DType dtype;
  std::int64_t n_out;
  std::vector<float> exact;  // [n_out, n_in], representable in dtype
  std::vector<std::uint16_t> halves;

  Weights(Random& random, DType type, std::int64_t out, std::int64_t in)
      : dtype(type), n_out(out), exact(random.normals(out * in)) {
    if (dtype == DType::kF32) return;
    for (float& value : exact) {
      const bool bf16 = dtype == DType::kBF16;
      halves.push_back(bf16 ? f32_to_bf16(value) : f32_to_f16(value));
      value = bf16 ? bf16_to_f32(halves.back()) : f16_to_f32(halves.back());
    }
  }
  WeightSource source() const {
    const void* data =
        dtype == DType::kF32 ? static_cast<const void*>(exact.data()) : halves.data();
    return {data, dtype, n_out};
  }
};

void expect_product(ConstRows x, const std::vector<float>& weights, std::span<const float> bias,
                    const GuardedRows& y, std::int64_t n_out, double tolerance) {
  y.check();
  for (std::int64_t i = 0; i < x.n_rows; ++i) {
    for (std::int64_t j = 0; j < n_out; ++j) {
      double sum = bias.empty() ? 0.0 : double{bias[static_cast<std::size_t>(j)]};
      double magnitude = std::abs(sum);
      for (std::int64_t k = 0; k < x.width; ++k) {
        const double term =
            double{x.row(i)[k]} * double{weights[static_cast<std::size_t>(j * x.width + k)]};
        sum += term;
        magnitude += std::abs(term);
      }
      ASSERT_NEAR(y.at(i, j), sum, tolerance * magnitude) << "row " << i << " output " << j;
    }
  }
}

TEST_P(LinearTest, ByEye) {
  const std::vector<float> weight = {1, 2, 3, 4, 5, 6};  // [3, 2]
  const std::vector<float> x = {10, 1, 0, 1};            // [2, 2]
  const std::vector<WeightSource> sources = {{weight.data(), DType::kF32, 3}};
  const std::vector<float> bias = {0, 0, 100};
  const auto packed =
      std::move(PackedLinear::pack(context(), sources, 2, LinearMath::kF32, bias)).value();
  EXPECT_EQ(packed.n_in(), 2);
  EXPECT_EQ(packed.n_out(), 3);
  EXPECT_GE(packed.bytes(), 6 * sizeof(float));
  GuardedRows y(2, 3);
  linear(context(), packed, {x.data(), 2, 2}, y.view());
  y.check();
  EXPECT_THAT((std::vector<float>{y.at(0, 0), y.at(0, 1), y.at(0, 2)}),
              testing::ElementsAre(12, 34, 156));
  EXPECT_THAT((std::vector<float>{y.at(1, 0), y.at(1, 1), y.at(1, 2)}),
              testing::ElementsAre(2, 4, 106));
}

TEST_P(LinearTest, AgainstDoublePrecision) {
  Random random(9);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const std::int64_t n_out : {1, 31, 32, 100, 161}) {
      for (const std::int64_t n_in : {1, 17, 64, 600}) {
        const Weights weights(random, dtype, n_out, n_in);
        const std::vector<WeightSource> sources = {weights.source()};
        const auto packed = std::move(PackedLinear::pack(context(), sources, n_in)).value();
        EXPECT_EQ(packed.dtype(), dtype);
        for (const std::int64_t n : {0, 1, 2, 3, 5, 13, 25, 61}) {
          const std::vector<float> x = random.normals(n * n_in);
          GuardedRows y(n, n_out);
          linear(context(), packed, {x.data(), n, n_in}, y.view());
          expect_product({x.data(), n, n_in}, weights.exact, {}, y, n_out, chain_tolerance(n_in));
        }
      }
    }
  }
}

TEST_P(LinearTest, ConcatenatesSources) {
  Random random(10);
  const std::int64_t n_in = 48;
  for (const bool mixed : {false, true}) {
    const Weights a(random, DType::kBF16, 40, n_in);
    const Weights b(random, mixed ? DType::kF16 : DType::kBF16, 7, n_in);
    const Weights c(random, DType::kBF16, 50, n_in);
    const std::vector<WeightSource> sources = {a.source(), b.source(), c.source()};
    const std::vector<float> bias = random.normals(97);
    const auto packed =
        std::move(PackedLinear::pack(context(), sources, n_in, LinearMath::kF32, bias)).value();
    EXPECT_EQ(packed.dtype(), mixed ? DType::kF32 : DType::kBF16);
    std::vector<float> all = a.exact;
    all.insert(all.end(), b.exact.begin(), b.exact.end());
    all.insert(all.end(), c.exact.begin(), c.exact.end());
    const std::vector<float> x = random.normals(9 * n_in);
    GuardedRows y(9, 97);
    linear(context(), packed, {x.data(), 9, n_in}, y.view());
    expect_product({x.data(), 9, n_in}, all, bias, y, 97, chain_tolerance(n_in));
  }
}

// The contract: the bits of a row do not depend on how many rows come with it, where it stands
// among them, or how many threads there are. 900 rows take several row blocks, 700 inputs several k
// blocks.
TEST_P(LinearTest, RowsDoNotDependOnTheBatch) {
  Random random(11);
  const std::int64_t n = 900;
  const std::int64_t n_in = 700;
  const std::int64_t n_out = 330;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Weights weights(random, dtype, n_out, n_in);
    const std::vector<WeightSource> sources = {weights.source()};
    const auto packed = std::move(PackedLinear::pack(context(), sources, n_in)).value();
    const std::vector<float> x = random.normals(n * n_in);
    GuardedRows all(n, n_out);
    linear(context(), packed, {x.data(), n, n_in}, all.view());
    all.check();
    const auto single = context_with(1);
    for (const std::int64_t batch : {1, 2, 3, 4, 6, 7, 12, 13, 24, 25, 37, 64, 100, 385}) {
      const std::int64_t first = random.below(n - batch + 1);
      GuardedRows part(batch, n_out);
      linear(batch % 2 == 0 ? context() : *single, packed, {x.data() + first * n_in, batch, n_in},
             part.view());
      expect_same_bits(part.view(), all.view().rows(first, batch));
    }
  }
}

// The order itself: one chain per output, fused where the instruction set can.
TEST_P(LinearTest, IsOneChainOverAscendingK) {
  const bool fused = GetParam().isa != CpuIsa::kPortable;
  Random random(12);
  const std::int64_t n_in = 515;
  const Weights weights(random, DType::kBF16, 70, n_in);
  const std::vector<WeightSource> sources = {weights.source()};
  const auto packed = std::move(PackedLinear::pack(context(), sources, n_in)).value();
  for (const std::int64_t n : {1, 40}) {
    const std::vector<float> x = random.normals(n * n_in);
    GuardedRows y(n, 70);
    linear(context(), packed, {x.data(), n, n_in}, y.view());
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < 70; ++j) {
        float sum = 0.0F;
        for (std::int64_t k = 0; k < n_in; ++k) {
          const float a = x[static_cast<std::size_t>(i * n_in + k)];
          const float b = weights.exact[static_cast<std::size_t>(j * n_in + k)];
          const volatile float product = a * b;
          sum = fused ? std::fma(a, b, sum) : sum + product;
        }
        ASSERT_EQ(y.at(i, j), sum);
      }
    }
  }
}

TEST_P(LinearTest, ReadsAndWritesStridedRows) {
  Random random(13);
  const Weights weights(random, DType::kF16, 33, 20);
  const std::vector<WeightSource> sources = {weights.source()};
  const auto packed = std::move(PackedLinear::pack(context(), sources, 20)).value();
  const std::vector<float> wide = random.normals(30 * 50);
  std::vector<float> dense;
  for (std::size_t i = 0; i < 30; ++i) {
    dense.insert(dense.end(), wide.begin() + static_cast<std::ptrdiff_t>(i * 50 + 7),
                 wide.begin() + static_cast<std::ptrdiff_t>(i * 50 + 27));
  }
  GuardedRows a(30, 33, 0);
  GuardedRows b(30, 33, 9);
  linear(context(), packed, ConstRows{wide.data(), 30, 50}.columns(7, 20), a.view());
  linear(context(), packed, {dense.data(), 30, 20}, b.view());
  a.check();
  b.check();
  expect_same_bits(a.view(), b.view());
}

// A range of the inputs is the product with all other inputs zero, without the bias, and the same
// bits in any batch.
TEST_P(LinearTest, SliceAppliesARangeOfInputs) {
  Random random(15);
  const std::int64_t n_in = 700;
  const std::int64_t n_out = 75;
  const std::vector<float> bias = random.normals(n_out);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Weights weights(random, dtype, n_out, n_in);
    const std::vector<WeightSource> sources = {weights.source()};
    const auto packed =
        std::move(PackedLinear::pack(context(), sources, n_in, LinearMath::kF32, bias)).value();
    for (const auto& [begin, width] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {0, 1}, {5, 64}, {640, 60}, {13, 600}, {0, 700}}) {
      std::vector<float> range;
      for (std::int64_t j = 0; j < n_out; ++j) {
        const auto row = weights.exact.begin() + j * n_in + begin;
        range.insert(range.end(), row, row + width);
      }
      const std::vector<float> x = random.normals(61 * width);
      GuardedRows all(61, n_out);
      linear_slice(context(), packed, begin, {x.data(), 61, width}, all.view());
      expect_product({x.data(), 61, width}, range, {}, all, n_out, chain_tolerance(width));
      for (const std::int64_t batch : {0, 1, 7, 30}) {
        GuardedRows part(batch, n_out);
        linear_slice(context(), packed, begin, {x.data(), batch, width}, part.view());
        expect_same_bits(part.view(), all.view().rows(0, batch));
      }
    }
  }
}

TEST_P(LinearTest, RefusesBadShapes) {
  const float weight = 1.0F;
  const std::vector<WeightSource> good = {{&weight, DType::kF32, 1}};
  const std::vector<WeightSource> empty = {{&weight, DType::kF32, 0}};
  const std::vector<WeightSource> huge = {{&weight, DType::kF32, std::int64_t{1} << 62}};
  EXPECT_FALSE(PackedLinear::pack(context(), {}, 1).ok());
  EXPECT_FALSE(PackedLinear::pack(context(), good, 0).ok());
  EXPECT_FALSE(PackedLinear::pack(context(), empty, 1).ok());
  EXPECT_FALSE(PackedLinear::pack(context(), huge, 8).ok());
  EXPECT_FALSE(
      PackedLinear::pack(context(), good, 1, LinearMath::kF32, std::vector<float>{1, 2}).ok());
}

// Activations are rounded to bf16 in this mode; products of two bf16 are exact in fp32.
TEST_P(LinearTest, Bf16MathAgainstDoublePrecision) {
  Random random(14);
  const std::int64_t n_in = 200;
  const std::int64_t n_out = 75;
  const Weights weights(random, DType::kBF16, n_out, n_in);
  const std::vector<WeightSource> sources = {weights.source()};
  const std::vector<float> bias = random.normals(n_out);
  auto packed = PackedLinear::pack(context(), sources, n_in, LinearMath::kBF16, bias);
  if (packed.status().code() == StatusCode::kUnimplemented) GTEST_SKIP() << "built without oneDNN";
  ASSERT_TRUE(packed.ok()) << packed.status().to_string();
  for (const std::int64_t n : {0, 1, 3, 8, 9, 40, 100}) {
    const std::vector<float> x = random.normals(n * n_in);
    std::vector<float> rounded;
    for (const float value : x) rounded.push_back(bf16_to_f32(f32_to_bf16(value)));
    for (int repeat = 0; repeat < 2; ++repeat) {
      GuardedRows y(n, n_out);
      linear(context(), packed.value(), {x.data(), n, n_in}, y.view());
      expect_product({rounded.data(), n, n_in}, weights.exact, bias, y, n_out,
                     chain_tolerance(n_in));
    }
  }
}

TEST_P(LinearTest, SliceOfBf16MathAgainstDoublePrecision) {
  Random random(16);
  const std::int64_t n_out = 75;
  const Weights weights(random, DType::kBF16, n_out, 200);
  const std::vector<WeightSource> sources = {weights.source()};
  auto packed = PackedLinear::pack(context(), sources, 200, LinearMath::kBF16);
  if (packed.status().code() == StatusCode::kUnimplemented) GTEST_SKIP() << "built without oneDNN";
  ASSERT_TRUE(packed.ok()) << packed.status().to_string();
  std::vector<float> range;
  for (std::int64_t j = 0; j < n_out; ++j) {
    const auto row = weights.exact.begin() + j * 200 + 64;
    range.insert(range.end(), row, row + 64);
  }
  for (const std::int64_t n : {1, 8, 100}) {
    const std::vector<float> x = random.normals(n * 64);
    std::vector<float> rounded;
    for (const float value : x) rounded.push_back(bf16_to_f32(f32_to_bf16(value)));
    GuardedRows y(n, n_out);
    linear_slice(context(), packed.value(), 64, {x.data(), n, 64}, y.view());
    expect_product({rounded.data(), n, 64}, range, {}, y, n_out, chain_tolerance(64));
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, LinearTest, testing::ValuesIn(all_backends()), backend_name);

}  // namespace
}  // namespace spindle::kernels
