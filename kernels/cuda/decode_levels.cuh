#pragma once
// Codes of Lloyd-Max levels to f16: planes of any width become words of eight nibbles, which
// permute instructions look up byte by byte.

#include <cstdint>

#include "kernels/core/dtype.h"
#include "kernels/cuda/decode_pipe.cuh"

namespace spindle::kernels::device {

// Low and high bytes of eight f16 numbers.
struct LevelTable {
  std::uint32_t low[2];
  std::uint32_t high[2];
};

constexpr LevelTable make_levels(const float (&levels)[8]) {
  LevelTable table{};
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t bits = f32_to_f16(levels[i]);
    table.low[i / 4] |= (bits & 0xffU) << (8 * (i % 4));
    table.high[i / 4] |= (bits >> 8) << (8 * (i % 4));
  }
  return table;
}

// The levels of kv_quant.h; of those of 4 bits, which are symmetric, the positive half.
template <int kBits>
struct Levels;
template <>
struct Levels<1> {
  static constexpr LevelTable kTable = make_levels({-0.79788F, 0.79788F, 0, 0, 0, 0, 0, 0});
};
template <>
struct Levels<2> {
  static constexpr LevelTable kTable =
      make_levels({-1.5104176F, -0.45278F, 0.45278F, 1.5104176F, 0, 0, 0, 0});
};
template <>
struct Levels<3> {
  static constexpr LevelTable kTable = make_levels(
      {-2.15195F, -1.34391F, -0.75600F, -0.24509F, 0.24509F, 0.75600F, 1.34391F, 2.15195F});
};
template <>
struct Levels<4> {
  static constexpr LevelTable kTable =
      make_levels({0.1284F, 0.3881F, 0.6568F, 0.9424F, 1.2562F, 1.6181F, 2.069F, 2.7326F});
};

// Eight codes to f16 pairs of codes (0, 1), (2, 3), (4, 5), (6, 7).
template <int kBits>
__device__ inline void lookup_levels(std::uint32_t word, std::uint32_t (&pairs)[4]) {
  constexpr LevelTable kTable = Levels<kBits>::kTable;
  std::uint32_t index = word;
  if constexpr (kBits == 4) {
    // Products leave the pipe of logical operations, which is the busiest, to the others.
    const std::uint32_t negative = ~word >> 3 & 0x11111111U;
    index = (word ^ negative * 7U) & 0x77777777U;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t low =
        byte_permute(kTable.low[0], kTable.low[1], half == 0 ? index : index >> 16);
    std::uint32_t high =
        byte_permute(kTable.high[0], kTable.high[1], half == 0 ? index : index >> 16);
    if constexpr (kBits == 4) {
      // Bit 3 of a selector repeats the byte's sign: 0xff for codes from 8 on, else 0x80.
      const std::uint32_t positive =
          byte_permute(0x80808080U, 0x80808080U, half == 0 ? word : word >> 16) * 2U;
      high |= ~positive & 0x80808080U;
    }
    pairs[2 * half] = byte_permute(low, high, 0x5140);
    pairs[2 * half + 1] = byte_permute(low, high, 0x7362);
  }
}

// Four codes of 2 bits in each half of a word, bits 0 to 7, to nibbles.
__device__ inline std::uint32_t spread_pairs(std::uint32_t x) {
  x &= 0x00ff00ffU;
  x = (x | x << 4) & 0x0f0f0f0fU;
  return (x | x << 2) & 0x33333333U;
}
// Four codes of 1 bit in each half of a word, bits 0 to 3, to nibbles.
__device__ inline std::uint32_t spread_bits(std::uint32_t x) {
  x &= 0x000f000fU;
  x = (x | x << 6) & 0x03030303U;
  return (x | x << 3) & 0x11111111U;
}

// A lane's words of one plane.
template <int kBits, int kDim>
struct Plane {
  static constexpr int kWords = kBits * kDim / 32;
  std::uint32_t words[kWords];

  __device__ void load(std::uint32_t plane, const Lane& lane) {
    if constexpr (kWords == 2) {
      const uint2 x = load_shared_8(plane + lane.index * 8);
      words[0] = x.x;
      words[1] = x.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 x = load_shared(plane + (i / 4 * 32 + lane.index) * 16);
        words[i] = x.x;
        words[i + 1] = x.y;
        words[i + 2] = x.z;
        words[i + 3] = x.w;
      }
    }
  }
  // V: the tokens 8 q + 0..7 of channel 16 m + 8 x + g, even ones first.
  __device__ std::uint32_t value_nibbles(int m, int x) const {
    if constexpr (kBits == 4) return words[2 * m + x];
    if constexpr (kBits == 2) return spread_pairs(words[m] >> (8 * x));
    if constexpr (kBits == 1) return spread_bits(words[m / 2] >> (4 * (m % 2 * 2 + x)));
  }
};

// A lane's words of one plane of K for the tile t.
template <int kBits, int kDim>
struct KeyPlane {
  std::uint32_t words[kDim / 32 * (kBits == 4 ? 2 : 1)];

  __device__ void load(std::uint32_t plane, int t, const Lane& lane) {
    if constexpr (kBits == 1) {
#pragma unroll
      for (int pair = 0; pair < kDim / 64; ++pair) {
        words[pair] = load_shared_4(plane + lane.index * (kDim / 8) + (2 * pair + t) * 4);
      }
    } else {
      constexpr int kChunks = kBits * kDim / 128;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint2 x = load_shared_8(plane + (chunk * 32 + lane.index) * 16 + t * 8);
        words[2 * chunk] = x.x;
        words[2 * chunk + 1] = x.y;
      }
    }
  }
  // The channels 32 j + 8 q + 0..7 of token (t, h), even ones first.
  __device__ std::uint32_t nibbles(int j, int h) const {
    if constexpr (kBits == 4) return words[2 * j + h];
    if constexpr (kBits == 2) return spread_pairs(words[j / 2 * 2 + h] >> (8 * (j % 2)));
    if constexpr (kBits == 1) return spread_bits(words[j / 2] >> (4 * (2 * h + j % 2)));
  }
};

template <int kBits, int kDim>
struct KeyCodes : KeyPlane<kBits, kDim> {};
template <int kDim>
struct KeyCodes<3, kDim> {
  KeyPlane<2, kDim> pairs;
  KeyPlane<1, kDim> bits;

  __device__ void load(std::uint32_t planes, int t, const Lane& lane) {
    pairs.load(planes, t, lane);
    bits.load(planes + 8 * kDim, t, lane);
  }
  __device__ std::uint32_t nibbles(int j, int h) const {
    return pairs.nibbles(j, h) | bits.nibbles(j, h) << 2;
  }
};

template <int kBits, int kDim>
struct ValueCodes : Plane<kBits, kDim> {};
template <int kDim>
struct ValueCodes<3, kDim> {
  Plane<2, kDim> pairs;
  Plane<1, kDim> bits;

  __device__ void load(std::uint32_t planes, const Lane& lane) {
    pairs.load(planes, lane);
    bits.load(planes + 8 * kDim, lane);
  }
  __device__ std::uint32_t value_nibbles(int m, int x) const {
    return pairs.value_nibbles(m, x) | bits.value_nibbles(m, x) << 2;
  }
};

}  // namespace spindle::kernels::device
