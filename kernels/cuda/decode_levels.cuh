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

// All pairs of 4-bit codes as f16 levels, once for every lane, so that the 32 lanes of a warp read
// from 32 banks whatever their codes are. A row takes 256 bytes and the table begins at a multiple
// of 64 KiB: then byte 1 of an address is the pair of codes, and one permute puts it there. A load
// and that permute replace six permutes a pair. The second halves of the rows are for other things.
struct LevelPairs {
  struct Row {
    std::uint32_t pairs[32];
    uint4 other[8];
  };
  Row rows[256];
};
static_assert(sizeof(LevelPairs) == 65536);
__device__ inline void fill_level_pairs(LevelPairs& table) {
  for (int i = threadIdx.x; i < 64 * 32; i += blockDim.x) {
    // The rows of i / 32, that + 64 .. that + 192, by the bytes of a word.
    std::uint32_t pairs[4];
    lookup_levels<4>(static_cast<std::uint32_t>(i / 32) * 0x01010101U + 0xc0804000U, pairs);
#pragma unroll
    for (int k = 0; k < 4; ++k) table.rows[64 * k + i / 32].pairs[i % 32] = pairs[k];
  }
}

// How a kernel turns codes to levels: by the table where shared memory has room for it.
template <bool kTable>
struct LevelLookup {
  std::uint32_t column = 0;  // shared address of the lane's column of LevelPairs

  LevelLookup() = default;
  __device__ explicit LevelLookup(std::uint32_t table) : column(table + 4 * (threadIdx.x % 32)) {}

  template <int kBits>
  __device__ void find(std::uint32_t word, std::uint32_t (&pairs)[4]) const {
    if constexpr (!kTable || kBits != 4) {
      lookup_levels<kBits>(word, pairs);
    } else {
      pairs[0] = load_constant(byte_permute(word, column, 0x7604));
      pairs[1] = load_constant(byte_permute(word, column, 0x7614));
      pairs[2] = load_constant(byte_permute(word, column, 0x7624));
      pairs[3] = load_constant(byte_permute(word, column, 0x7634));
    }
  }
};

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
};

// Words of nibbles of K for the tokens (t, 0) and (t, 1): the channels 32 chunk + 8 q + 0..7, even
// ones first. They are read chunk by chunk, so that few are in registers.
template <int kBits, int kDim>
__device__ inline void load_key_nibbles(std::uint32_t (&words)[2], std::uint32_t plane, int t,
                                        int chunk, const Lane& lane) {
  if constexpr (kBits == 4) {
    const uint2 x = load_shared_8(plane + (chunk * 32 + lane.index) * 16 + t * 8);
    words[0] = x.x;
    words[1] = x.y;
  } else if constexpr (kBits == 3) {
    std::uint32_t high[2];
    load_key_nibbles<2, kDim>(words, plane, t, chunk, lane);
    load_key_nibbles<1, kDim>(high, plane + 8 * kDim, t, chunk, lane);
    words[0] |= high[0] << 2;
    words[1] |= high[1] << 2;
  } else if constexpr (kBits == 2) {
    const uint2 x = load_shared_8(plane + (chunk / 2 * 32 + lane.index) * 16 + t * 8);
    words[0] = spread_pairs(x.x >> (8 * (chunk % 2)));
    words[1] = spread_pairs(x.y >> (8 * (chunk % 2)));
  } else {
    const std::uint32_t x =
        load_shared_4(plane + lane.index * (kDim / 8) + (chunk / 2 * 2 + t) * 4);
    words[0] = spread_bits(x >> (4 * (chunk % 2)));
    words[1] = spread_bits(x >> (4 * (2 + chunk % 2)));
  }
}

// Words of nibbles of V for the channels 32 i + 16 m + 8 x + g, [m][x]: the tokens 8 q + 0..7, even
// ones first.
template <int kBits, int kDim>
__device__ inline void load_value_nibbles(std::uint32_t (&words)[2][2], std::uint32_t plane, int i,
                                          const Lane& lane) {
  if constexpr (kBits == 4) {
    const uint4 x = load_shared(plane + (i * 32 + lane.index) * 16);
    words[0][0] = x.x;
    words[0][1] = x.y;
    words[1][0] = x.z;
    words[1][1] = x.w;
  } else if constexpr (kBits == 3) {
    std::uint32_t high[2][2];
    load_value_nibbles<2, kDim>(words, plane, i, lane);
    load_value_nibbles<1, kDim>(high, plane + 8 * kDim, i, lane);
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w / 2][w % 2] |= high[w / 2][w % 2] << 2;
  } else if constexpr (kBits == 2) {
    const uint2 x = load_shared_8(plane + (i / 2 * 32 + lane.index) * 16 + i % 2 * 8);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w / 2][w % 2] = spread_pairs((w / 2 == 0 ? x.x : x.y) >> (8 * (w % 2)));
    }
  } else {
    const std::uint32_t x = load_shared_4(plane + lane.index * (kDim / 8) + i * 4);
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w / 2][w % 2] = spread_bits(x >> (4 * w));
  }
}

}  // namespace spindle::kernels::device
