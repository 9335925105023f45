#include "kernels/kv_quant.h"

#include "tests/kernels/kv_pieces.h"

namespace spindle::kernels {
namespace {

using testing::ElementsAre;

TEST(Hadamard, SmallByEye) {
  std::vector<float> x = {1, 2, 3, 4};
  hadamard(x);
  EXPECT_THAT(x, ElementsAre(5, -1, -2, 0));
  std::vector<float> odd = {1, 2, 3};  // blocks of one
  hadamard(odd);
  EXPECT_THAT(odd, ElementsAre(1, 2, 3));
  std::vector<float> blocks = {3, 1, 2, 4, 6, 6};  // three blocks of two
  hadamard(blocks);
  const float r = 1.0F / std::sqrt(2.0F);
  EXPECT_THAT(blocks, ElementsAre(4 * r, 2 * r, 6 * r, -2 * r, 12 * r, 0));
  hadamard({});
}

TEST(Hadamard, IsTheDefinitionAndItsOwnInverse) {
  Random random(11);
  for (const int dim : {1, 2, 8, 32, 64, 80, 96, 128, 256}) {
    const std::vector<float> x = random.normals(dim);
    const std::vector<double> expected = naive_hadamard(std::vector<double>(x.begin(), x.end()));
    std::vector<float> y = x;
    hadamard(y);
    for (std::size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 4e-6) << dim;
    hadamard(y);
    for (std::size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], x[i], 4e-6) << dim;
  }
}

TEST(KvMean, SmallByEye) {
  const std::vector<float> x = {1, 2, 99, 3, 5, 99, 5, -1, 99};
  std::vector<std::uint16_t> mean(2);
  kv_mean({x.data(), 3, 2, 3}, mean);
  EXPECT_EQ(f16_to_f32(mean[0]), 3.0F);
  EXPECT_EQ(f16_to_f32(mean[1]), 2.0F);
  kv_mean({x.data(), 0, 2, 3}, mean);
  EXPECT_THAT(mean, ElementsAre(0, 0));
}

TEST(KvMean, ManyRowsWithAndWithoutAPair) {
  Random random(12);
  for (const std::int64_t n : {1, 2, 7, 1000}) {
    const std::vector<float> x = random.normals(n * 100);
    std::vector<std::uint16_t> mean(100);
    kv_mean({x.data(), n, 100}, mean);
    for (std::int64_t c = 0; c < 100; ++c) {
      double sum = 0;
      for (std::int64_t t = 0; t < n; ++t) sum += x[static_cast<std::size_t>(t * 100 + c)];
      ASSERT_NEAR(f16_to_f32(mean[static_cast<std::size_t>(c)]), sum / static_cast<double>(n),
                  1e-6 + std::abs(sum / static_cast<double>(n)) * 0x1p-11);
    }
  }
}

TEST(LloydLevels, AscendSymmetricAndAreFixedPoints) {
  for (int bits = 1; bits <= 4; ++bits) {
    const std::span<const float> levels = lloyd_levels(bits);
    ASSERT_EQ(levels.size(), std::size_t{1} << bits);
    for (std::size_t i = 0; i < levels.size(); ++i) {
      EXPECT_EQ(levels[i], -levels[levels.size() - 1 - i]);
      if (i > 0) {
        EXPECT_GT(levels[i], levels[i - 1]);
      }
      // Lloyd-Max: a level is the mean of N(0, 1) between the midpoints around it.
      const auto midpoint = [&](std::size_t right) {
        return right == 0               ? -1e9
               : right == levels.size() ? 1e9
                                        : (double{levels[right - 1]} + double{levels[right]}) / 2;
      };
      const double low = midpoint(i);
      const double high = midpoint(i + 1);
      const double mass = (std::erf(high / std::sqrt(2)) - std::erf(low / std::sqrt(2))) / 2;
      const double moment =
          (std::exp(-low * low / 2) - std::exp(-high * high / 2)) / std::sqrt(2 * std::acos(-1));
      EXPECT_NEAR(levels[i], moment / mass, bits == 4 ? 5e-4 : 2e-5) << bits << " bits, " << i;
    }
  }
}

// Every channel of the key holds the token's number, so its codes are known.
TEST(KvEncode, Kivi4OfARampByEye) {
  const KvCase c{KvFormat::kKivi4, KvSide::kKey, 32};
  std::vector<float> x(32 * 32);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i / 32);
  Pieces pieces(c);
  pieces.encode({x.data(), 32, 32}, {});
  const float step = f16_to_f32(f32_to_f16(31.0F / 15.0F));
  for (std::size_t channel = 0; channel < 32; ++channel) {
    ASSERT_EQ(pieces.scale(channel), step);
    ASSERT_EQ(pieces.scale(32 + channel), 0.0F);
  }
  EXPECT_EQ(pieces.code(0, 5), 0);
  EXPECT_EQ(pieces.code(1, 5), 0);
  EXPECT_EQ(pieces.code(2, 5), 1);
  EXPECT_EQ(pieces.code(16, 5), 8);
  EXPECT_EQ(pieces.code(31, 5), 15);
  // Byte 0 of a channel: tokens 0 and 16.
  EXPECT_EQ(std::to_integer<int>(pieces.view().codes[0]), 0x80);
}

TEST(KvEncode, Lloyd1IsTheSignAndTheNorm) {
  const KvCase c{KvFormat::kLloyd1, KvSide::kValue, 32};
  // Rotated, the vector is 8 at channel 0 and 0 elsewhere; a zero is on the midpoint, code 0.
  const std::vector<float> x(32, std::sqrt(2.0F));
  const std::vector<std::uint16_t> mean(32);
  Pieces pieces(c);
  pieces.encode({x.data(), 1, 32}, mean);
  EXPECT_EQ(pieces.code(0, 0), 1);
  for (int channel = 1; channel < 32; ++channel) ASSERT_EQ(pieces.code(0, channel), 0);
  EXPECT_NEAR(pieces.scale(0), 8.0 / (0.79788 * std::sqrt(32)), 2e-3);
}

// Whole numbers y, exact through the rotation, with y[0] / (|y| / 8) on the midpoint of the two
// positive levels to the last bit.
std::vector<float> vector_on_a_midpoint(float midpoint) {
  for (int a = 300; a < 490; ++a) {
    const auto square = static_cast<int>(std::lround(std::pow(8.0 * a / double{midpoint}, 2)));
    if (static_cast<float>(a) / (std::sqrt(static_cast<float>(square)) / 8.0F) != midpoint) {
      continue;
    }
    // Four squares make up the rest of |y|^2; three do for some a.
    const int rest = square - 2 * a * a;
    for (int b = static_cast<int>(std::sqrt(rest)); b > 0; --b) {
      for (int c = static_cast<int>(std::sqrt(rest - b * b)); c >= 0; --c) {
        const int left = rest - b * b - c * c;
        const int d = static_cast<int>(std::lround(std::sqrt(left)));
        if (d * d != left) continue;
        std::vector<float> y(64);
        y[0] = static_cast<float>(a);
        y[1] = static_cast<float>(-a);
        y[2] = static_cast<float>(b);
        y[3] = static_cast<float>(c);
        y[4] = static_cast<float>(d);
        return y;
      }
    }
  }
  return {};
}

TEST(KvEncode, AValueOnAMidpointTakesTheLowerLevel) {
  const std::span<const float> levels = lloyd_levels(2);
  const std::vector<float> y = vector_on_a_midpoint((levels[2] + levels[3]) / 2.0F);
  ASSERT_FALSE(y.empty());
  std::vector<float> x = y;
  hadamard(x);
  const std::vector<std::uint16_t> mean(64);
  Pieces pieces({KvFormat::kLloyd2, KvSide::kKey, 64});
  pieces.encode({x.data(), 1, 64}, mean);
  EXPECT_EQ(pieces.code(0, 0), 2);
  EXPECT_EQ(pieces.code(0, 1), 0);
  EXPECT_EQ(pieces.code(0, 63), 1);  // zero, between the two inner levels
}

class KvFormats : public testing::TestWithParam<KvCase> {};

std::string case_name(const testing::TestParamInfo<KvCase>& info) {
  const KvFormat f = info.param.format;
  const std::string format = is_lloyd(f)            ? "lloyd" + std::to_string(bits_of(f))
                             : f == KvFormat::kInt4 ? "int4"
                                                    : "kivi" + std::to_string(bits_of(f));
  return format + (info.param.side == KvSide::kKey ? "_k_" : "_v_") +
         std::to_string(info.param.dim);
}

std::vector<KvCase> all_cases() {
  std::vector<KvCase> cases;
  for (const KvFormat format :
       {KvFormat::kInt4, KvFormat::kKivi4, KvFormat::kKivi2, KvFormat::kLloyd1, KvFormat::kLloyd2,
        KvFormat::kLloyd3, KvFormat::kLloyd4}) {
    for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
      for (const int dim : {32, 64, 96, 128}) cases.push_back({format, side, dim});
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, KvFormats, testing::ValuesIn(all_cases()), case_name);

// A block of x, encoded and decoded, against a naive quantiser in fp64.
void expect_round_trip(const KvCase& c, const std::vector<float>& x, std::int64_t n,
                       const std::vector<std::uint16_t>& mean) {
  Pieces pieces(c);
  pieces.encode({x.data(), n, c.dim}, mean);
  GuardedRows decoded(n, c.dim);
  kv_decode(c.format, c.side, pieces.view(), mean, decoded.view());
  decoded.check();
  const int n_bits = bits_of(c.format);
  for (int t = 0; t < n; ++t) {
    const float* row = x.data() + std::int64_t{t} * c.dim;
    std::vector<double> y =
        is_rotated(c.format)
            ? naive_rotated(row, c.dim, is_lloyd(c.format) ? mean : std::vector<std::uint16_t>{})
            : std::vector<double>(row, row + c.dim);
    std::vector<double> stored(y.size());
    double square = 0;
    for (const double v : y) square += v * v;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const int channel = static_cast<int>(i);
      const int code = pieces.code(t, channel);
      if (is_lloyd(c.format)) {
        const double scale = pieces.scale(static_cast<std::size_t>(t));
        stored[i] = double{lloyd_levels(n_bits)[static_cast<std::size_t>(code)]} * scale;
        if (scale == 0) {
          ASSERT_EQ(code, 0);
          continue;
        }
        // The nearest level, but for values within float error of a midpoint.
        const double z = y[i] / std::sqrt(square / c.dim);
        for (const float level : lloyd_levels(n_bits)) {
          const double here = lloyd_levels(n_bits)[static_cast<std::size_t>(code)];
          ASSERT_LE(std::abs(z - here), std::abs(z - double{level}) + 1e-4) << t << ", " << i;
        }
        continue;
      }
      std::size_t group = static_cast<std::size_t>(t);
      if (is_kivi(c.format)) {
        group = c.side == KvSide::kKey ? i : i / 32 * 32 + static_cast<std::size_t>(t);
      }
      const double scale = pieces.scale(group);
      const double low = pieces.scale(pieces.n_scales() / 2 + group);
      stored[i] = code * scale + low;
      if (scale == 0) {
        ASSERT_EQ(code, 0);
      }
      // Half a step, what fp16 loses of the minimum and of 15 steps, and float error.
      const double extent = std::abs(low) + 15 * scale;
      ASSERT_LE(std::abs(y[i] - stored[i]), scale / 2 + extent * 0x1p-11 + 0x1p-24 * 8)
          << t << ", " << i;
    }
    if (is_rotated(c.format)) stored = naive_hadamard(stored);
    for (std::size_t i = 0; i < stored.size(); ++i) {
      const double centre = is_lloyd(c.format) ? double{f16_to_f32(mean[i])} : 0.0;
      ASSERT_NEAR(decoded.at(t, static_cast<std::int64_t>(i)), stored[i] + centre,
                  2e-6 * (std::sqrt(square) + std::abs(centre)) + 1e-30);
    }
  }
}

TEST_P(KvFormats, RoundTripOfNormals) {
  Random random(21);
  std::vector<float> x = random.normals(32 * GetParam().dim);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += 3.0F * std::sin(static_cast<float>(i % 31));
  std::vector<std::uint16_t> mean(static_cast<std::size_t>(GetParam().dim));
  kv_mean({x.data(), 32, GetParam().dim}, mean);
  expect_round_trip(GetParam(), x, 32, mean);
}

TEST_P(KvFormats, RoundTripOfMagnitudesFromTinyToHuge) {
  Random random(22);
  const std::vector<std::uint16_t> mean(static_cast<std::size_t>(GetParam().dim));
  for (const float magnitude : {3e-8F, 1e-7F, 1e-3F, 1.0F, 300.0F, 4000.0F}) {
    SCOPED_TRACE(magnitude);
    std::vector<float> x = random.normals(32 * GetParam().dim);
    for (float& v : x) v *= magnitude;
    expect_round_trip(GetParam(), x, 32, mean);
  }
}

TEST_P(KvFormats, ZerosAndConstantsAreExact) {
  const KvCase& c = GetParam();
  const std::vector<std::uint16_t> mean(static_cast<std::size_t>(c.dim));
  std::vector<float> x(static_cast<std::size_t>(32 * c.dim));
  Pieces pieces(c);
  pieces.encode({x.data(), 32, c.dim}, mean);
  for (int t = 0; t < 32; ++t) {
    for (int i = 0; i < c.dim; ++i) ASSERT_EQ(pieces.code(t, i), 0);
  }
  GuardedRows decoded(32, c.dim);
  kv_decode(c.format, c.side, pieces.view(), mean, decoded.view());
  expect_same_bits({x.data(), 32, c.dim}, decoded.view());
  if (is_lloyd(c.format)) {
    // All of the vector in the mean: nothing is left to encode.
    std::fill(x.begin(), x.end(), -1.5F);
    const std::vector<std::uint16_t> all(mean.size(), f32_to_f16(-1.5F));
    pieces.encode({x.data(), 32, c.dim}, all);
    kv_decode(c.format, c.side, pieces.view(), all, decoded.view());
    expect_same_bits({x.data(), 32, c.dim}, decoded.view());
  } else if (is_kivi(c.format)) {
    std::fill(x.begin(), x.end(), -1.5F);
    pieces.encode({x.data(), 32, c.dim}, mean);
    kv_decode(c.format, c.side, pieces.view(), mean, decoded.view());
    expect_same_bits({x.data(), 32, c.dim}, decoded.view());
  }
}

TEST_P(KvFormats, BeyondHalfPrecisionStaysFinite) {
  const KvCase& c = GetParam();
  Random random(23);
  const std::vector<std::uint16_t> mean(static_cast<std::size_t>(c.dim));
  std::vector<float> x = random.normals(32 * c.dim);
  for (float& v : x) v *= 1e9F;
  Pieces pieces(c);
  pieces.encode({x.data(), 32, c.dim}, mean);
  GuardedRows decoded(32, c.dim);
  kv_decode(c.format, c.side, pieces.view(), mean, decoded.view());
  for (std::int64_t t = 0; t < 32; ++t) {
    for (std::int64_t i = 0; i < c.dim; ++i) ASSERT_TRUE(std::isfinite(decoded.at(t, i)));
  }
}

TEST_P(KvFormats, TokensOfAPartialBlockAreThoseOfAFullOne) {
  const KvCase& c = GetParam();
  if (is_kivi(c.format) && c.side == KvSide::kKey) return;  // its groups are whole blocks
  Random random(24);
  const std::vector<float> x = random.normals(32 * (c.dim + 5));
  std::vector<std::uint16_t> mean(static_cast<std::size_t>(c.dim), f32_to_f16(0.25F));
  Pieces full(c);
  full.encode({x.data(), 32, c.dim, c.dim + 5}, mean);
  for (const int n : {0, 1, 7, 16, 31}) {
    Pieces part(c);
    part.encode({x.data(), n, c.dim, c.dim + 5}, mean);
    for (int t = 0; t < 32; ++t) {
      for (int i = 0; i < c.dim; ++i) ASSERT_EQ(part.code(t, i), t < n ? full.code(t, i) : 0);
    }
    for (std::size_t i = 0; i < full.n_scales(); ++i) {
      const bool used = static_cast<int>(i % 32) < n;
      ASSERT_EQ(part.scale_bits(i), used ? full.scale_bits(i) : 0) << i;
    }
    GuardedRows decoded(n, c.dim);
    kv_decode(c.format, c.side, part.view(), mean, decoded.view());
    decoded.check();
  }
}

TEST_P(KvFormats, NotANumberHarmsOnlyItsGroup) {
  const KvCase& c = GetParam();
  Random random(25);
  std::vector<float> x = random.normals(32 * c.dim);
  const std::vector<std::uint16_t> mean(static_cast<std::size_t>(c.dim));
  Pieces clean(c);
  clean.encode({x.data(), 32, c.dim}, mean);
  x[static_cast<std::size_t>(3 * c.dim + 1)] = std::numeric_limits<float>::quiet_NaN();
  x[static_cast<std::size_t>(3 * c.dim + 2)] = std::numeric_limits<float>::infinity();
  Pieces pieces(c);
  pieces.encode({x.data(), 32, c.dim}, mean);
  const bool per_channel = is_kivi(c.format) && c.side == KvSide::kKey;
  for (int t = 0; t < 32; ++t) {
    for (int i = 0; i < c.dim; ++i) {
      if (per_channel ? i == 1 || i == 2 : t == 3) continue;
      ASSERT_EQ(pieces.code(t, i), clean.code(t, i));
    }
  }
}

}  // namespace
}  // namespace spindle::kernels
