#pragma once
// Units of Lloyd-Max levels. Keys are levels times scale plus mean, in the Hadamard basis and
// before RoPE: four of the transform's stages are products on the tensor cores with a 16 x 16
// matrix, the others are butterflies in registers, and the last one is taken together with the
// rotation, whose pairs it shares.

#include <cstdint>

#include "kernels/cuda/decode_levels.cuh"
#include "kernels/cuda/decode_rope.cuh"

namespace spindle::kernels::device {

// B operands of the 16 x 16 Hadamard matrix over the channel bits 0, 1, 3 and 4, times 1/4. Inputs:
// k = 2q + e is channel 8q + 2e, k = 2q + 8 + e channel 8q + 2e + 1. Outputs of tile n: column 2q +
// e is channel 8q + 2n + e.
struct HadamardOperand {
  std::uint32_t b[2][2];  // [n][k / 8]

  __device__ explicit HadamardOperand(const Lane& lane) {
    constexpr std::uint32_t kQuarter = 0x34003400U;
    const bool odd = (__popc(lane.q & (lane.g >> 1)) & 1) != 0;
    const std::uint32_t even_rows = odd ? kQuarter | 0x80008000U : kQuarter;
    const std::uint32_t odd_rows = (lane.g & 1) != 0 ? even_rows ^ 0x80008000U : even_rows;
    b[0][0] = even_rows;
    b[0][1] = odd_rows;
    b[1][0] = even_rows ^ 0x80000000U;
    b[1][1] = odd_rows ^ 0x80000000U;
  }
};

__device__ inline void butterfly_f16(std::uint32_t& a, std::uint32_t& b) {
  const std::uint32_t sum = add_f16(a, b);
  b = sub_f16(a, b);
  a = sum;
}

// The f16 number of the lane's token row, twice.
__device__ inline std::uint32_t twice_of_key_token(std::uint32_t word, const Lane& lane) {
  return byte_permute(word, word, lane.g % 2 == 0 ? 0x1010 : 0x3232);
}

// Words of nibbles of K as load_key_nibbles() has them. Those of 4 bits are read for both t at
// once: reading every other 8 bytes would be as much work for each.
template <int kBits, int kDim>
struct KeyNibbles {
  std::uint32_t plane;
  uint2 second[kBits == 4 ? kDim / 32 : 1];  // of t = 1

  __device__ void load(std::uint32_t (&words)[2], int t, int chunk, const Lane& lane) {
    if constexpr (kBits == 4) {
      if (t == 0) {
        const uint4 x = load_shared(plane + (chunk * 32 + lane.index) * 16);
        words[0] = x.x;
        words[1] = x.y;
        second[chunk] = {x.z, x.w};
      } else {
        words[0] = second[chunk].x;
        words[1] = second[chunk].y;
      }
    } else {
      load_key_nibbles<kBits, kDim>(words, plane, t, chunk, lane);
    }
  }
};

// The key tile t (16 tokens) with all but one stage of the transform, [chunk][u][n][h]: channels
// 32 chunk + 8q + 4u + 2n of token (t, h). `k_mean` is in the Hadamard basis: [chunk][quad] of
// pairs in the order of lookup_levels().
template <int kBits, int kDim, bool kTable>
__device__ inline void lloyd_keys(std::uint32_t (&k)[kDim / 32][2][2][2],
                                  KeyNibbles<kBits, kDim>& codes, int t,
                                  const LevelLookup<kTable>& levels,
                                  const std::uint32_t (&scale)[2], std::uint32_t k_mean,
                                  const HadamardOperand& hadamard, const Lane& lane) {
#pragma unroll
  for (int chunk = 0; chunk < kDim / 32; ++chunk) {
    const Words4 mean = words(load_shared(k_mean + (chunk * 4 + lane.q) * 16));
    std::uint32_t nibbles[2];
    codes.load(nibbles, t, chunk, lane);
    std::uint32_t y[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      levels.template find<kBits>(nibbles[h], y[h]);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[h][i] = fma_f16(y[h][i], scale[h], mean.x[i]);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_f16_to_f16(k[chunk][u][n][0], k[chunk][u][n][1], y[0][u], y[1][u], y[0][2 + u],
                       y[1][2 + u], hadamard.b[n][0], hadamard.b[n][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) butterfly_f16(k[chunk][0][i / 2][i % 2], k[chunk][1][i / 2][i % 2]);
  }
  if constexpr (kDim == 128) {
#pragma unroll
    for (int chunk = 0; chunk < 4; chunk += 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        butterfly_f16(k[chunk][i / 4][i / 2 % 2][i % 2], k[chunk + 1][i / 4][i / 2 % 2][i % 2]);
      }
    }
  }
}

// A warp's query tile, turned back to the base position of a block: fragments of load_query(). With
// a table of levels it lies in the second halves of 4 kDim / 32 rows of it.
template <int kDim, bool kTable>
struct TurnedQuery {
  static constexpr int kTileBytes = (kTable ? 32 : 16) * kDim;
  // Whether a tile of at most four heads may have them twice, so that lanes share what they read.
  static constexpr bool kTwice = kTable && kDim == 128;
  std::uint32_t at;  // shared address of the lane's fragment of chunk 0

  // `tile`: shared address of the tile. With `is_half` it is turned by turn_half() only.
  __device__ TurnedQuery(std::uint32_t tile, const Lane& lane, bool is_half = false)
      : at(tile + offset(0, is_half && kTwice ? lane.index % 16 : lane.index)) {}

  __device__ static int offset(int chunk, int index) {
    if constexpr (kTable) return (4 * chunk + index / 8) * 256 + index % 8 * 16;
    return (32 * chunk + index) * 16;
  }
  __device__ Words4 load(int chunk) const { return words(load_shared(at + offset(chunk, 0))); }
  __device__ void store(int chunk, const Words4& x) const {
    store_shared(at + offset(chunk, 0), joined(x));
  }

  // The same as turn() of a tile of at most four heads, which come again as the other four: half of
  // the lanes turn the first chunks, the others the rest.
  __device__ void turn_half(std::uint32_t q, std::uint32_t angles, const Lane& lane) const {
    if constexpr (!kTwice) return turn(q, angles, lane);
    // The lane's fragment is that of lane % 16 in chunk lane / 16: 16 fragments behind its own.
    const int chunk = lane.index / 16;
    __syncwarp();
    const QueryPair<kDim> pair(q + 256 * chunk, 0, angles + 128 * chunk, lane);
    const std::uint32_t to = at + offset(1, 0) * chunk;
    store_shared(to, joined(pair.low));
    store_shared(to + offset(kDim / 64, 0), joined(pair.high));
    __syncwarp();
  }
  // `q`: the tile before it is turned. Lanes see the whole after this.
  __device__ void turn(std::uint32_t q, std::uint32_t angles, const Lane& lane) const {
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < kDim / 64; ++chunk) {
      const QueryPair<kDim> pair(q, chunk, angles, lane);
      store(chunk, pair.low);
      store(chunk + kDim / 64, pair.high);
    }
    __syncwarp();
  }
};

// The scores of 16 tokens, [2 h + head].
template <int kBits, AngleKind kKind, int kDim, bool kTable>
__device__ inline void lloyd_tile_scores(float (&scores)[4], int t, std::uint32_t stage,
                                         KeyNibbles<kBits, kDim>& codes,
                                         const TurnedQuery<kDim, kTable>& q, std::uint32_t k_mean,
                                         const BlockAngles& block,
                                         const LevelLookup<kTable>& levels,
                                         const HadamardOperand& hadamard, const DecodeCall& call,
                                         const Lane& lane) {
  // Scales of the tokens (t, 0) and (t, 1) and of their neighbours.
  const uint2 scales = load_shared_8(stage + 4 * kBits * kDim + lane.g / 2 * 16 + t * 8);
  const std::uint32_t scale[2] = {twice_of_key_token(scales.x, lane),
                                  twice_of_key_token(scales.y, lane)};
  std::uint32_t k[kDim / 32][2][2][2];
  lloyd_keys<kBits, kDim>(k, codes, t, levels, scale, k_mean, hadamard, lane);
  float sums[2][4] = {};  // two, which are shorter chains
#pragma unroll
  for (int chunk = 0; chunk < kDim / 64; ++chunk) {
    auto& low = k[chunk];
    auto& high = k[chunk + kDim / 64];
    // The last stage and the rotation of the pairs (low, high).
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Angles angles = token_angles<kDim, kKind>(block, 2 * t + h, chunk, call, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        std::uint32_t& a = low[i / 2][i % 2][h];
        std::uint32_t& b = high[i / 2][i % 2][h];
        const std::uint32_t turned = fma_f16(b, angles.plus.x[i], mul_f16(a, angles.less.x[i]));
        b = fma_f16(negate_f16(b), angles.less.x[i], mul_f16(a, angles.plus.x[i]));
        a = turned;
      }
    }
    const Words4 q_low = q.load(chunk);
    const Words4 q_high = q.load(chunk + kDim / 64);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      mma_f16(sums[0], low[u][0][0], low[u][0][1], low[u][1][0], low[u][1][1], q_low.x[2 * u],
              q_low.x[2 * u + 1]);
      mma_f16(sums[1], high[u][0][0], high[u][0][1], high[u][1][0], high[u][1][1], q_high.x[2 * u],
              q_high.x[2 * u + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = sums[0][i] + sums[1][i];
}

// `q` is turned back as `block` says. One tile after the other: the order of its volatile loads
// keeps the keys of only one in registers.
template <int kBits, AngleKind kKind, int kDim, bool kTable>
__device__ inline void lloyd_scores(Softmax<kDim>& s, std::uint32_t stage,
                                    const TurnedQuery<kDim, kTable>& q, std::uint32_t k_mean,
                                    const BlockAngles& block, const LevelLookup<kTable>& levels,
                                    const DecodeCall& call, const Lane& lane) {
  const HadamardOperand hadamard(lane);
  KeyNibbles<kBits, kDim> codes{stage, {}};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    lloyd_tile_scores<kBits, kKind>(s.weights[t], t, stage, codes, q, k_mean, block, levels,
                                    hadamard, call, lane);
  }
}

// B operands of the product with values of levels: weights times scales. Codes 0 to 3 of a word are
// the even tokens: (0, 2), (4, 6), then (1, 3), (5, 7).
struct ValueWeights {
  std::uint32_t even[2];
  std::uint32_t odd[2];

  // `scales`: shared address of the values' scales.
  __device__ ValueWeights(const float (&weights)[2][4], std::uint32_t scales, const Lane& lane) {
    std::uint32_t pairs[4];
    pack_weights<false>(weights, pairs);
    times_scales(pairs, words(load_shared(scales + 16 * lane.q)));
    even[0] = byte_permute(pairs[0], pairs[1], 0x5410);
    even[1] = byte_permute(pairs[2], pairs[3], 0x5410);
    odd[0] = byte_permute(pairs[0], pairs[1], 0x7632);
    odd[1] = byte_permute(pairs[2], pairs[3], 0x7632);
  }
};

// The lane's words of a block's values, [i][m][x] as load_value_nibbles() has them.
template <int kBits, int kDim>
struct LevelWords {
  std::uint32_t nibbles[kDim / 32][2][2];

  __device__ LevelWords(std::uint32_t codes, const Lane& lane) {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) load_value_nibbles<kBits, kDim>(nibbles[i], codes, i, lane);
  }

  template <bool kTable>
  __device__ void add(Softmax<kDim>& s, const ValueWeights& weights,
                      const LevelLookup<kTable>& levels) const {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        std::uint32_t v[2][4];
#pragma unroll
        for (int x = 0; x < 2; ++x) levels.template find<kBits>(nibbles[i][m][x], v[x]);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          mma_f16(s.values[2 * i + m], v[0][p], v[1][p], v[0][2 + p], v[1][2 + p], weights.even[p],
                  weights.odd[p]);
        }
      }
    }
  }
};

// The caller adds the mass of the weights to that of the values whose mean is missing.
template <int kBits, int kDim, bool kTable>
__device__ inline void lloyd_values(Softmax<kDim>& s, std::uint32_t stage,
                                    const LevelLookup<kTable>& levels, const Lane& lane) {
  const ValueWeights weights(s.weights, stage + 4 * kBits * kDim, lane);
  LevelWords<kBits, kDim>(stage, lane).add(s, weights, levels);
}

}  // namespace spindle::kernels::device
