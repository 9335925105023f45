#pragma once
// What the tests of the KV codecs share: the encoded pieces of one side, read by the tables of
// kv_block.h, and the rotation in fp64.

#include <bit>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "kernels/kv_quant.h"
#include "tests/kernels/kernel_fixture.h"

namespace spindle::kernels {

// A format of one side at one head_dim.
struct KvCase {
  KvFormat format;
  KvSide side;
  int dim;
};

inline int bits_of(KvFormat format) {
  if (is_lloyd(format)) return lloyd_bits(format);
  return format == KvFormat::kKivi2 ? 2 : 4;
}
inline bool is_kivi(KvFormat format) {
  return format == KvFormat::kKivi4 || format == KvFormat::kKivi2;
}

// The pieces of one side between guard bytes.
class Pieces {
 public:
  explicit Pieces(const KvCase& c)
      : case_(c), bytes_(kv_side_bytes(c.format, c.side, c.dim, DType::kF16)) {
    codes_.assign(bytes_.codes + 2 * kGuard, kFill);
    scales_.assign(bytes_.scales + 2 * kGuard, kFill);
  }

  void encode(ConstRows x, std::span<const std::uint16_t> mean) {
    kv_encode(case_.format, case_.side, x, mean, codes_.data() + kGuard, scales_.data() + kGuard);
    for (std::size_t i = 0; i < kGuard; ++i) {
      ASSERT_EQ(codes_[i], kFill);
      ASSERT_EQ(scales_[i], kFill);
      ASSERT_EQ(codes_[codes_.size() - 1 - i], kFill);
      ASSERT_EQ(scales_[scales_.size() - 1 - i], kFill);
    }
  }
  KvPieces view() const { return {codes_.data() + kGuard, scales_.data() + kGuard}; }
  std::size_t n_scales() const { return bytes_.scales / 2; }

  // By the tables of kv_block.h, apart from the code under test.
  int code(int token, int channel) const {
    const bool key = case_.side == KvSide::kKey;
    const int group = key ? channel : token * (case_.dim / 32) + channel / 32;
    const int j = key ? token : channel % 32;
    switch (bits_of(case_.format)) {
      case 4:
        return (byte(16 * group + j % 16) >> (4 * (j / 16))) & 15;
      case 3:
        return ((byte(8 * group + j % 8) >> (2 * (j / 8))) & 3) |
               (bit(8 * case_.dim + 4 * group, j) << 2);
      case 2:
        return (byte(8 * group + j % 8) >> (2 * (j / 8))) & 3;
      default:
        return bit(4 * group, j);
    }
  }
  std::uint16_t scale_bits(std::size_t index) const {
    std::uint16_t half;
    std::memcpy(&half, scales_.data() + kGuard + 2 * index, 2);
    return half;
  }
  float scale(std::size_t index) const { return f16_to_f32(scale_bits(index)); }
  const std::vector<std::byte>& codes() const { return codes_; }
  const std::vector<std::byte>& scales() const { return scales_; }

 private:
  static constexpr std::size_t kGuard = 32;
  static constexpr std::byte kFill{0xa5};

  int byte(int index) const {
    return std::to_integer<int>(codes_[kGuard + static_cast<std::size_t>(index)]);
  }
  int bit(int first_byte, int j) const { return (byte(first_byte + j / 8) >> (j % 8)) & 1; }

  KvCase case_;
  KvSideBytes bytes_;
  std::vector<std::byte> codes_;
  std::vector<std::byte> scales_;
};

inline double hadamard_sign(int i, int j) {
  return std::popcount(static_cast<unsigned>(i & j)) % 2 == 0 ? 1.0 : -1.0;
}

// In fp64 by the definition.
inline std::vector<double> naive_hadamard(std::span<const double> x) {
  const int dim = static_cast<int>(x.size());
  const int n = dim & -dim;
  std::vector<double> y(x.size());
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < n; ++j) {
      const int block = i / n * n;
      y[static_cast<std::size_t>(i)] +=
          x[static_cast<std::size_t>(block + j)] * hadamard_sign(i % n, j) / std::sqrt(n);
    }
  }
  return y;
}

inline std::vector<double> naive_rotated(const float* x, int dim,
                                         std::span<const std::uint16_t> mean) {
  std::vector<double> centred(static_cast<std::size_t>(dim));
  for (std::size_t c = 0; c < centred.size(); ++c) {
    centred[c] = double{x[c]} - (mean.empty() ? 0.0 : double{f16_to_f32(mean[c])});
  }
  return naive_hadamard(centred);
}

}  // namespace spindle::kernels
