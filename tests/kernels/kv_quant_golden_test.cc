// The codes, scales and means of the reference for layer 9.
#include "tests/kernels/golden_kv.h"
#include "tests/kernels/kv_pieces.h"

namespace spindle::kernels {
namespace {

constexpr std::int64_t kLayer9Tokens = 1755;
constexpr std::int64_t kLayer9Dim = 64;

std::size_t at(std::int64_t head, std::int64_t token, std::int64_t n = kLayer9Tokens) {
  return static_cast<std::size_t>(head * n + token);
}

// Encodes the first n tokens of head `head` block by block and calls visit(pieces, first token, n).
template <typename Visit>
void for_each_block(const KvCase& c, const std::vector<float>& rows, std::int64_t head,
                    std::int64_t n, std::span<const std::uint16_t> mean, Visit&& visit) {
  for (std::int64_t first = 0; first < n; first += 32) {
    const std::int64_t count = std::min<std::int64_t>(32, n - first);
    Pieces pieces(c);
    pieces.encode({rows.data() + at(head, first) * kLayer9Dim, count, kLayer9Dim}, mean);
    visit(pieces, first, static_cast<int>(count));
  }
}

TEST(KvQuantGolden, Kivi4) {
  const GoldenKv golden;
  const std::vector<float> k = golden.read_f16("layer9.k");
  const std::vector<float> v = golden.read_f16("layer9.v");
  const auto k_code = golden.read<std::uint32_t>("kivi4.k.code");
  const auto k_scale = golden.read<std::uint16_t>("kivi4.k.scale");
  const auto k_min = golden.read<std::uint16_t>("kivi4.k.min");
  const auto v_code = golden.read<std::uint32_t>("kivi4.v.code");
  const auto v_scale = golden.read<std::uint16_t>("kivi4.v.scale");
  const auto v_min = golden.read<std::uint16_t>("kivi4.v.min");
  for (std::int64_t head = 0; head < 2; ++head) {
    for_each_block({KvFormat::kKivi4, KvSide::kKey, 64}, k, head, 1728, {},
                   [&](const Pieces& pieces, std::int64_t first, int n) {
                     for (std::size_t i = 0; i < 64; ++i) {
                       const std::size_t group = at(head, first / 32, 54) * 64 + i;
                       ASSERT_EQ(pieces.scale_bits(i), k_scale[group]);
                       ASSERT_EQ(pieces.scale_bits(64 + i), k_min[group]);
                       for (int t = 0; t < n; ++t) {
                         const std::size_t word = at(head, (first + t) / 8, 216) * 64 + i;
                         const int expected =
                             static_cast<int>((k_code[word] >> (4 * (t % 8))) & 15U);
                         ASSERT_EQ(pieces.code(t, static_cast<int>(i)), expected);
                       }
                     }
                   });
    for_each_block({KvFormat::kKivi4, KvSide::kValue, 64}, v, head, 1723, {},
                   [&](const Pieces& pieces, std::int64_t first, int n) {
                     for (int t = 0; t < n; ++t) {
                       for (std::size_t i = 0; i < 64; ++i) {
                         const std::size_t token = at(head, first + t, 1723);
                         const std::size_t slot = i / 32 * 32 + static_cast<std::size_t>(t);
                         ASSERT_EQ(pieces.scale_bits(slot), v_scale[token * 2 + i / 32]);
                         ASSERT_EQ(pieces.scale_bits(64 + slot), v_min[token * 2 + i / 32]);
                         const int expected =
                             static_cast<int>((v_code[token * 8 + i / 8] >> (4 * (i % 8))) & 15U);
                         ASSERT_EQ(pieces.code(t, static_cast<int>(i)), expected);
                       }
                     }
                   });
  }
}

struct Mismatches {
  int scales = 0;
  int codes = 0;
  double worst_margin = 0;  // of a differing code, from its rounding boundary in steps
};

// Differing codes are neighbours, and the exact value is next to the boundary between them.
void count_code(int code, int expected, double z, double boundary, Mismatches& found) {
  if (code == expected) return;
  ++found.codes;
  ASSERT_EQ(std::abs(code - expected), 1);
  found.worst_margin = std::max(found.worst_margin, std::abs(z - boundary));
}

Mismatches rot4_mismatches(const GoldenKv& golden, const std::string& side_name, KvSide side) {
  const std::vector<float> x = golden.read_f16("layer9." + side_name);
  const auto code = golden.read<std::uint8_t>("rot4." + side_name + ".code");
  const auto scale = golden.read<std::uint16_t>("rot4." + side_name + ".scale");
  const auto low = golden.read<std::uint16_t>("rot4." + side_name + ".min");
  Mismatches found;
  for (std::int64_t head = 0; head < 2; ++head) {
    const auto visit = [&](const Pieces& pieces, std::int64_t first, int n) {
      for (int t = 0; t < n; ++t) {
        const std::size_t token = at(head, first + t);
        const auto slot = static_cast<std::size_t>(t);
        if (pieces.scale_bits(slot) != scale[token] || pieces.scale_bits(32 + slot) != low[token]) {
          ++found.scales;
          continue;
        }
        const std::vector<double> y = naive_rotated(x.data() + token * 64, 64, {});
        for (int i = 0; i < 64; ++i) {
          const int byte = code[token * 32 + static_cast<std::size_t>(i / 2)];
          const int expected = i % 2 == 0 ? byte & 15 : byte >> 4;
          const double z = (y[static_cast<std::size_t>(i)] - double{pieces.scale(32 + slot)}) /
                           double{pieces.scale(slot)};
          const double boundary = (expected + pieces.code(t, i)) / 2.0;
          count_code(pieces.code(t, i), expected, z, boundary, found);
        }
      }
    };
    for_each_block({KvFormat::kInt4, side, 64}, x, head, kLayer9Tokens, {}, visit);
  }
  return found;
}

TEST(KvQuantGolden, Rot4) {
  const GoldenKv golden;
  for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
    const Mismatches found = rot4_mismatches(golden, side == KvSide::kKey ? "k" : "v", side);
    EXPECT_EQ(found.scales, 0);
    EXPECT_EQ(found.codes, 0) << "up to " << found.worst_margin << " from a boundary";
  }
}

Mismatches pc_mismatches(const GoldenKv& golden, KvSide side, int bits) {
  const bool key = side == KvSide::kKey;
  const std::string prefix = key ? "pc.k." : "pc.v.";
  const std::vector<float> x = golden.read_f16(key ? "layer9.kpre" : "layer9.v");
  const auto means = golden.read<std::uint16_t>(prefix + "mean");
  const auto code = golden.read<std::uint8_t>(prefix + "code" + std::to_string(bits));
  const auto scale = golden.read<std::uint16_t>(prefix + "scale" + std::to_string(bits));
  const std::span<const float> levels = lloyd_levels(bits);
  const KvFormat format = bits == 4 ? KvFormat::kLloyd4 : KvFormat::kLloyd2;
  Mismatches found;
  for (std::int64_t head = 0; head < 2; ++head) {
    const std::span<const std::uint16_t> mean = std::span(means).subspan(at(head, 0, 64), 64);
    std::vector<std::uint16_t> computed(64);
    kv_mean({x.data() + at(head, 0) * 64, kLayer9Tokens, 64}, computed);
    EXPECT_TRUE(std::equal(mean.begin(), mean.end(), computed.begin())) << prefix << head;
    const auto visit = [&](const Pieces& pieces, std::int64_t first, int n) {
      for (int t = 0; t < n; ++t) {
        const std::size_t token = at(head, first + t);
        if (pieces.scale_bits(static_cast<std::size_t>(t)) != scale[token]) {
          ++found.scales;
          const int ulps = pieces.scale_bits(static_cast<std::size_t>(t)) - scale[token];
          EXPECT_EQ(std::abs(ulps), 1);
        }
        const std::vector<double> y = naive_rotated(x.data() + token * 64, 64, mean);
        double square = 0;
        for (const double value : y) square += value * value;
        for (std::size_t i = 0; i < 64; ++i) {
          const int ours = pieces.code(t, static_cast<int>(i));
          const int expected = code[token * 64 + i];
          const double boundary = (double{levels[static_cast<std::size_t>(ours)]} +
                                   double{levels[static_cast<std::size_t>(expected)]}) /
                                  2;
          count_code(ours, expected, y[i] / std::sqrt(square / 64), boundary, found);
        }
      }
    };
    for_each_block({format, side, 64}, x, head, kLayer9Tokens, mean, visit);
  }
  return found;
}

TEST(KvQuantGolden, Lloyd) {
  const GoldenKv golden;
  for (const KvSide side : {KvSide::kKey, KvSide::kValue}) {
    for (const int bits : {4, 2}) {
      const Mismatches found = pc_mismatches(golden, side, bits);
      EXPECT_EQ(found.scales, 0) << bits;
      EXPECT_EQ(found.codes, 0) << bits << " bits, up to " << found.worst_margin
                                << " from a boundary";
    }
  }
}

}  // namespace
}  // namespace spindle::kernels
