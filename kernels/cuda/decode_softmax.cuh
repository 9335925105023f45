#pragma once
// The online softmax of a warp: scores and weights of 32 tokens and 8 heads, and the weighted sums
// of values. A lane has the scores of its four tokens (t, h) for the heads 2q and 2q + 1, and the
// sums of the channels 16 m + 8 x + g for the same heads.
//
// The sums are in one of several bases; a change of basis, between runs of blocks of different
// formats, transforms them in place.

#include <cstdint>

#include "kernels/cuda/decode_pipe.cuh"

namespace spindle::kernels::device {

enum class Basis : int {
  kPlain,
  kHadamard,
  kHadamardCodes,  // in units of kCodeUnit
};

__device__ inline Basis basis_of(KvFormat format) {
  if (format == KvFormat::kInt4) return Basis::kHadamardCodes;
  return has_levels(format) ? Basis::kHadamard : Basis::kPlain;
}

// Codes of 4 bits are f16 subnormals to the tensor cores: code c in the low bits is c * 2^-24.
inline constexpr float kCodeUnit = 0x1p-24F;
inline constexpr float kCodeUnitInverse = 0x1p24F;
// The weight of the score `best` is 2^5, and weights are up to 2^8, so that small ones keep their
// digits in f16; the factor cancels. Only scores that would be beyond raise `best`: that takes a
// reduction over the warp and changes all sums.
inline constexpr float kWeightExponent = 5.0F;
inline constexpr float kBestSlack = 3.0F;

template <int kDim>
__device__ constexpr float norm() {
  return kDim == 64 ? 0.125F : 0.08838834764831845F;
}

template <int kDim>
struct Softmax {
  float values[kDim / 16][4];  // [m][2 x + head]
  float weights[2][4];         // [t][2 h + head]: scores, then weights of the current unit
  float best[2];               // of the warp, in powers of two; others are up to kBestSlack more
  float mass[2];               // of the lane's tokens
  float minima[4];             // sum of weight times minimum, int4 values; like a tile of `values`
  float centred[2];            // mass of values whose mean is still to be added
  Basis basis = Basis::kPlain;

  __device__ void start() {
#pragma unroll
    for (auto& tile : values) {
#pragma unroll
      for (float& value : tile) value = 0.0F;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      best[e] = -INFINITY;
      mass[e] = minima[e] = minima[2 + e] = centred[e] = 0.0F;
    }
    basis = Basis::kPlain;
  }

  // Scores to weights; `scale` is that of the scores times log2(e). Sums that a kernel does not
  // need stay zero without taking registers.
  template <bool kMinima, bool kCentred>
  __device__ void step(const Stage& stage, const Lane& lane, float scale) {
    if (stage.is_partial()) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int token = lane.key_token() + 2 * w;
        if (token < stage.first() || token >= stage.end()) {
          weights[w / 2][w % 2 * 2] = weights[w / 2][w % 2 * 2 + 1] = -INFINITY;
        }
      }
    }
    step_visible<kMinima, kCentred>(scale);
  }
  // The same of a unit whose tokens are all visible.
  template <bool kMinima, bool kCentred>
  __device__ void step_visible(float scale) {
    float high[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      high[e] = scale * fmaxf(fmaxf(weights[0][e], weights[0][2 + e]),
                              fmaxf(weights[1][e], weights[1][2 + e]));
    }
    if (__any_sync(kAllLanes, high[0] > best[0] + kBestSlack || high[1] > best[1] + kBestSlack)) {
      raise_best<kMinima, kCentred>(high);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float offset = kWeightExponent - best[e];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float& weight = weights[w / 2][w % 2 * 2 + e];
        weight = exp2_fast(fmaf(weight, scale, offset));
        mass[e] += weight;
      }
    }
  }

  // Begins to sum up the mass from zero; what was before it is returned, with the score it is of.
  struct Earlier {
    float best[2];
    float mass[2];
    float centred[2];
  };
  __device__ Earlier begin_run() {
    const Earlier earlier = {{best[0], best[1]}, {mass[0], mass[1]}, {centred[0], centred[1]}};
    mass[0] = mass[1] = centred[0] = centred[1] = 0.0F;
    return earlier;
  }
  // The mass since then was of centred values.
  __device__ void end_centred_run(const Earlier& earlier) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float factor = earlier.best[e] == best[e] ? 1.0F : exp2_fast(earlier.best[e] - best[e]);
      centred[e] = fmaf(earlier.centred[e], factor, mass[e]);
      mass[e] = fmaf(earlier.mass[e], factor, mass[e]);
    }
    clear_weights();
  }
  // They are not used any more.
  __device__ void clear_weights() {
#pragma unroll
    for (int i = 0; i < 8; ++i) weights[i / 4][i % 4] = 0.0F;
  }
  // The current unit's values are centred.
  __device__ void add_centred() {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      centred[e] += weights[0][e] + weights[0][2 + e] + weights[1][e] + weights[1][2 + e];
    }
  }

  __device__ void change_basis(Basis wanted, const Lane& lane) {
    if (basis == wanted) return;
    float factor = 1.0F;
    if (basis == Basis::kHadamardCodes) factor = kCodeUnitInverse;
    if (wanted == Basis::kHadamardCodes) factor *= kCodeUnit;
    if ((basis == Basis::kPlain) != (wanted == Basis::kPlain)) {
      factor *= norm<kDim>();
      // Channel bits 0 to 2 are g, bit 3 is x, the others m.
      const float sign[3] = {lane.g % 2 != 0 ? -1.0F : 1.0F, lane.g / 2 % 2 != 0 ? -1.0F : 1.0F,
                             lane.g / 4 != 0 ? -1.0F : 1.0F};
#pragma unroll
      for (auto& tile : values) {
#pragma unroll
        for (float& value : tile) {
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            value = fmaf(value, sign[i], __shfl_xor_sync(kAllLanes, value, 4 << i));
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) butterfly(tile[e], tile[2 + e]);
      }
#pragma unroll
      for (int bit = 1; bit < kDim / 16; bit *= 2) {
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m) {
          if ((m & bit) != 0) continue;
#pragma unroll
          for (int r = 0; r < 4; ++r) butterfly(values[m][r], values[m + bit][r]);
        }
      }
    }
#pragma unroll
    for (auto& tile : values) {
#pragma unroll
      for (float& value : tile) value *= factor;
    }
    basis = wanted;
  }

  // Sums over the lanes' tokens, and what minima and means add to the values in the plain basis.
  __device__ void finish(const Lane& lane, const std::uint16_t* v_mean) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        mass[e] += __shfl_xor_sync(kAllLanes, mass[e], step);
        centred[e] += __shfl_xor_sync(kAllLanes, centred[e], step);
      }
      // A constant vector of the Hadamard basis is the plain basis' channel 0.
      if (lane.g == 0) values[0][e] += minima[e] / norm<kDim>();
    }
    if (v_mean == nullptr) return;
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float mean = half_bits_to_float(v_mean[16 * m + 8 * (r / 2) + lane.g]);
        values[m][r] += centred[r % 2] * mean;
      }
    }
  }

 private:
  // `high`: the lane's highest scores, in powers of two.
  template <bool kMinima, bool kCentred>
  __device__ void raise_best(float (&high)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        high[e] = fmaxf(high[e], __shfl_xor_sync(kAllLanes, high[e], step));
      }
      const float now = fmaxf(best[e], high[e]);
      const float factor = exp2_fast(best[e] - now);
      best[e] = now;
      mass[e] *= factor;
      if constexpr (kMinima) {
        minima[e] *= factor;
        minima[2 + e] *= factor;
      }
      if constexpr (kCentred) centred[e] *= factor;
#pragma unroll
      for (auto& tile : values) {
        tile[e] *= factor;
        tile[2 + e] *= factor;
      }
    }
  }

  __device__ static void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
  }
};

// B operands of the product with V: weights of the token pairs w = 2 t + h of every lane.
template <bool kBf16>
__device__ inline void pack_weights(const float (&weights)[2][4], std::uint32_t (&pairs)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int at = w % 2 * 2;
    pairs[w] = transpose_8x8(pack<kBf16>(weights[w / 2][at], weights[w / 2][at + 1]));
  }
}

// Weights times scales or minima as B operands are finite also when both are large.
__device__ inline float f16_range(float x) { return fmaxf(fminf(x, 65504.0F), -65504.0F); }

// Such weights times scales of the tokens, f16 [32] at the shared address `scales`; finite also
// when both are large. Transposed, a lane has the weights of the tokens 8 q + 2 w and 8 q + 2 w
// + 1.
inline constexpr std::uint32_t kLargestF16 = 0x7bff7bffU;
__device__ inline void times_scales(std::uint32_t (&pairs)[4], const Words4& scale) {
#pragma unroll
  for (int w = 0; w < 4; ++w) pairs[w] = min_f16(mul_f16(pairs[w], scale.x[w]), kLargestF16);
}

}  // namespace spindle::kernels::device
