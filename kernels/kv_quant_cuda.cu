#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/kv_codec.cuh"
#include "kernels/kv_quant.h"

namespace spindle::kernels {
namespace {

using codec::CodeTile;
using codec::Eight;
using codec::kAllLanes;
using codec::kGroup;

// What lloyd needs of its levels, by bits - 1. Classes are the positive levels, ascending.
struct LloydTable {
  std::int32_t midpoints[4][7];  // bits of the floats between neighbouring classes
  double least_square[4];        // of class 0
  double gains[4][8];            // square of a class less that of class 0
};

LloydTable lloyd_table() {
  LloydTable table{};
  for (int bits = 1; bits <= 4; ++bits) {
    const float* levels = lloyd_levels(bits).data();
    const int half = 1 << (bits - 1);
    const auto square = [&](int magnitude) {
      return static_cast<double>(levels[half + magnitude]) *
             static_cast<double>(levels[half + magnitude]);
    };
    table.least_square[bits - 1] = square(0);
    for (int i = 1; i < half; ++i) {
      const float midpoint = (levels[half + i - 1] + levels[half + i]) / 2.0F;
      __builtin_memcpy(&table.midpoints[bits - 1][i - 1], &midpoint, sizeof(midpoint));
      table.gains[bits - 1][i] = square(i) - square(0);
    }
  }
  return table;
}

// a / divisor for divisors with a correctly rounded reciprocal: nearest after one correction when
// the divisor has the 11 bits of an f16 (quotients keep 2^-12 of a step from every tie), after two
// (Markstein) for any.
__device__ __forceinline__ float corrected(float quotient, float a, float divisor,
                                           float reciprocal) {
  return __fmaf_rn(__fmaf_rn(-quotient, divisor, a), reciprocal, quotient);
}

// What the codes of a group of even steps are computed with.
struct Steps {
  float divisor;
  float reciprocal;  // 0 for scale 0, which makes all codes 0
  float minimum;
  std::uint16_t scale_bits;
  std::uint16_t minimum_bits;
};

__device__ __forceinline__ Steps steps_of(float low, float high, float top) {
  Steps steps;
  steps.scale_bits = codec::saturated_f16(__fdiv_rn(__fsub_rn(high, low), top));
  steps.minimum_bits = codec::saturated_f16(low);
  const float scale = codec::f16_value(steps.scale_bits);
  steps.divisor = scale == 0.0F ? 1.0F : scale;
  steps.reciprocal = scale == 0.0F ? 0.0F : __frcp_rn(scale);
  steps.minimum = codec::f16_value(steps.minimum_bits);
  return steps;
}

// The code in the low bits of a float's mantissa.
__device__ __forceinline__ unsigned step_code(float y, const Steps& steps, float top) {
  const float a = __fsub_rn(y, steps.minimum);
  const float quotient =
      corrected(__fmul_rn(a, steps.reciprocal), a, steps.divisor, steps.reciprocal);
  const int bits = min(max(__float_as_int(quotient), 0), __float_as_int(top));
  return __float_as_uint(__fadd_rn(__int_as_float(bits), 0x1p23F)) & 0xffU;
}

// The first of equal values counts, as in the CPU body: zeros have signs.
__device__ __forceinline__ void widen_range(float value, float& low, float& high) {
  low = value < low ? value : low;
  high = value > high ? value : high;
}

__device__ __forceinline__ void range_of(const float (&y)[kGroup], float& low, float& high) {
  low = y[0];
  high = y[0];
#pragma unroll
  for (int i = 1; i < kGroup; ++i) {
    low = fminf(low, y[i]);
    high = fmaxf(high, y[i]);
  }
  if (low != 0.0F && high != 0.0F) return;
  low = y[0];
  high = y[0];
#pragma unroll
  for (int i = 1; i < kGroup; ++i) widen_range(y[i], low, high);
}

__device__ __forceinline__ void step_codes(const float (&y)[kGroup], const Steps& steps, float top,
                                           std::uint32_t (&codes)[kGroup / 4]) {
#pragma unroll
  for (int i = 0; i < kGroup; i += 4) {
    codes[i / 4] = step_code(y[i], steps, top) | step_code(y[i + 1], steps, top) << 8 |
                   step_code(y[i + 2], steps, top) << 16 | step_code(y[i + 3], steps, top) << 24;
  }
}

// The place of this thread in the block: see kv_codec.cuh.
template <int kDim>
struct Place {
  static constexpr int kGroups = kDim / kGroup;
  int token = static_cast<int>(threadIdx.x) / kGroups;
  int group = static_cast<int>(threadIdx.x) % kGroups;
};

// int4: one group of steps per token.
template <int kDim>
__device__ void encode_int4(const DeviceEncode& block, float (&y)[kGroup],
                            std::uint32_t (&codes)[kGroup / 4]) {
  const Place<kDim> place;
  constexpr float kTop = 15.0F;
  codec::hadamard<kDim>(y);
  float low;
  float high;
  range_of(y, low, high);
#pragma unroll
  for (int lanes = 1; lanes < Place<kDim>::kGroups; lanes *= 2) {
    const float other_low = __shfl_xor_sync(kAllLanes, low, lanes);
    const float other_high = __shfl_xor_sync(kAllLanes, high, lanes);
    const bool upper = (place.group & lanes) != 0;
    float first_low = upper ? other_low : low;
    float first_high = upper ? other_high : high;
    const float second_low = upper ? low : other_low;
    const float second_high = upper ? high : other_high;
    low = second_low < first_low ? second_low : first_low;
    high = second_high > first_high ? second_high : first_high;
  }
  const Steps steps = steps_of(low, high, kTop);
  step_codes(y, steps, kTop, codes);
  if (place.group != 0) return;
  auto* scales = reinterpret_cast<std::uint16_t*>(block.scales);
  const bool used = place.token < block.n;
  scales[place.token] = used ? steps.scale_bits : std::uint16_t{0};
  scales[kKvBlockTokens + place.token] = used ? steps.minimum_bits : std::uint16_t{0};
}

// KIVI's V: one group of steps per token and 32 channels.
template <int kDim>
__device__ void encode_kivi_values(const DeviceEncode& block, float top, const float (&y)[kGroup],
                                   std::uint32_t (&codes)[kGroup / 4]) {
  const Place<kDim> place;
  float low;
  float high;
  range_of(y, low, high);
  const Steps steps = steps_of(low, high, top);
  step_codes(y, steps, top, codes);
  auto* scales = reinterpret_cast<std::uint16_t*>(block.scales);
  const bool used = place.token < block.n;
  const int at = place.group * kKvBlockTokens + place.token;
  scales[at] = used ? steps.scale_bits : std::uint16_t{0};
  scales[kDim + at] = used ? steps.minimum_bits : std::uint16_t{0};
}

// KIVI's K: one group of steps per channel. A thread is a channel here.
template <int kDim>
__device__ void encode_kivi_keys(const DeviceEncode& block, float top, CodeTile<kDim>& tile) {
  const int channel = static_cast<int>(threadIdx.x);
  const auto* rows = reinterpret_cast<const std::uint16_t*>(block.rows);
  float y[kGroup];
#pragma unroll
  for (int t = 0; t < kKvBlockTokens; ++t) {
    y[t] = t < block.n ? codec::f16_value(rows[t * kDim + channel]) : 0.0F;
  }
  float low;
  float high;
  range_of(y, low, high);
  const Steps steps = steps_of(low, high, top);
#pragma unroll
  for (int t = 0; t < kKvBlockTokens; ++t) {
    tile.at(t, channel) = static_cast<std::uint8_t>(step_code(y[t], steps, top));
  }
  auto* scales = reinterpret_cast<std::uint16_t*>(block.scales);
  scales[channel] = steps.scale_bits;
  scales[kDim + channel] = steps.minimum_bits;
}

// The number of midpoints below key.
template <int kClasses>
__device__ __forceinline__ unsigned class_of(int key, const std::int32_t (&midpoints)[7]) {
  if constexpr (kClasses == 1) {
    return 0;
  } else if constexpr (kClasses == 2) {
    return key > midpoints[0] ? 1U : 0U;
  } else if constexpr (kClasses == 4) {
    const bool upper = key > midpoints[1];
    const unsigned odd = key > (upper ? midpoints[2] : midpoints[0]) ? 1U : 0U;
    return (upper ? 2U : 0U) + odd;
  } else {
    const bool upper = key > midpoints[3];
    const bool second = key > (upper ? midpoints[5] : midpoints[1]);
    const std::int32_t low = second ? midpoints[2] : midpoints[0];
    const std::int32_t high = second ? midpoints[6] : midpoints[4];
    const unsigned odd = key > (upper ? high : low) ? 1U : 0U;
    return (upper ? 4U : 0U) + (second ? 2U : 0U) + odd;
  }
}

// Exact, and cheaper than a conversion.
__device__ __forceinline__ double small_double(std::uint32_t value) {
  return __hiloint2double(0x43300000, static_cast<int>(value)) - 0x1p52;
}

template <int kDim, int kBits>
__device__ void encode_lloyd(const DeviceEncode& block, const LloydTable& table, float (&y)[kGroup],
                             std::uint32_t (&codes)[kGroup / 4]) {
  constexpr int kHalf = 1 << (kBits - 1);
  constexpr unsigned kMask = 2 * kHalf - 1;
  constexpr int kGroups = Place<kDim>::kGroups;
  const Place<kDim> place;
  const int token_lane = static_cast<int>(threadIdx.x) % 32 - place.group;
#pragma unroll
  for (int i = 0; i < kGroup; i += 8) {
    const Eight mean = codec::load_eight(block.mean + place.group * kGroup + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) y[i + j] = __fsub_rn(y[i + j], codec::f16_value(mean.at[j]));
  }
  codec::hadamard<kDim>(y);

  // The norm: eights of channels first, then those in order.
  float parts[kGroup / 8];
#pragma unroll
  for (int i = 0; i < kGroup / 8; ++i) {
    parts[i] = __fmul_rn(y[8 * i], y[8 * i]);
#pragma unroll
    for (int j = 1; j < 8; ++j) {
      parts[i] = __fadd_rn(parts[i], __fmul_rn(y[8 * i + j], y[8 * i + j]));
    }
  }
  float square = 0.0F;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup / 8; ++i) {
      square = __fadd_rn(square, __shfl_sync(kAllLanes, parts[i], token_lane + g));
    }
  }
  const float norm = __fsqrt_rn(square);
  const float root = __fsqrt_rn(static_cast<float>(kDim));
  const float divisor = norm > 0.0F ? __fdiv_rn(norm, root) : 1.0F;
  const float reciprocal = norm > 0.0F ? __frcp_rn(divisor) : 0.0F;

  // Codes, and how often each class occurs among these channels, in bytes.
  std::uint32_t counts[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kGroup / 4; ++i) codes[i] = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    float z = corrected(__fmul_rn(y[i], reciprocal), y[i], divisor, reciprocal);
    z = corrected(z, y[i], divisor, reciprocal);
    const unsigned bits = __float_as_uint(z);
    const int key = static_cast<int>((bits & 0x7fffffffU) + (bits >> 31));
    const unsigned magnitude = class_of<kHalf>(key, table.midpoints[kBits - 1]);
    const unsigned mirror = z > 0.0F ? kMask : 0U;
    const unsigned code = (static_cast<unsigned>(kHalf - 1) - magnitude) ^ mirror;
    codes[i / 4] |= (code & 0xffU) << (8 * (i % 4));
    if constexpr (kHalf > 1) {
      const std::uint32_t one = 1U << (8 * (magnitude & 3U));
      counts[0] += magnitude < 4 ? one : 0U;
      if constexpr (kHalf > 4) counts[1] += magnitude < 4 ? 0U : one;
    }
  }
  double squares = kDim * table.least_square[kBits - 1];
  if constexpr (kHalf > 1) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const std::uint32_t low = __shfl_sync(kAllLanes, counts[0], token_lane + g);
      const std::uint32_t high = kHalf > 4 ? __shfl_sync(kAllLanes, counts[1], token_lane + g) : 0U;
#pragma unroll
      for (int m = 1; m < kHalf; ++m) {
        const std::uint32_t count = ((m < 4 ? low : high) >> (8 * (m % 4))) & 0xffU;
        squares = __dadd_rn(squares, __dmul_rn(small_double(count), table.gains[kBits - 1][m]));
      }
    }
  }
  const std::uint16_t scale =
      codec::saturated_f16(__fdiv_rn(norm, __double2float_rn(__dsqrt_rn(squares))));
  const bool used = place.token < block.n;
  if ((scale & 0x7fffU) == 0) {
#pragma unroll
    for (int i = 0; i < kGroup / 4; ++i) codes[i] = 0;
  }
  if (place.group == 0) {
    reinterpret_cast<std::uint16_t*>(block.scales)[place.token] = used ? scale : std::uint16_t{0};
  }
}

// Rows of a raw block, padded so that columns are read without bank conflicts.
template <int kDim>
struct RawTile {
  static constexpr int kStride = kDim + 2;
  std::uint16_t values[kKvBlockTokens * kStride];
};

template <int kDim, bool kIsBf16>
__device__ void encode_raw(const DeviceEncode& block, RawTile<kDim>& tile) {
  const auto* rows = reinterpret_cast<const std::uint16_t*>(block.rows);
  const int capacity = block.capacity;
  const int n = min(static_cast<int>(block.n), capacity);
  const int thread = static_cast<int>(threadIdx.x);
  const auto element = [](std::uint16_t bits) {
    return kIsBf16 ? codec::narrowed<true>(codec::f16_value(bits)) : bits;
  };
  if (block.side == KvSide::kKey) {
    // Eights of channels in the order of the block: [d / 32][capacity][4].
    for (int item = thread; item < kDim / 8 * capacity; item += kDim) {
      const int eight = item % 4;
      const int token = item / 4 % capacity;
      const int panel = item / 4 / capacity;
      Eight out{};
      if (token < n) {
        out = codec::load_eight(rows + token * kDim + panel * 32 + eight * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) out.at[i] = element(out.at[i]);
      }
      codec::store_eight(block.codes + item * 16, out);
    }
    return;
  }
  for (int item = thread; item < kDim / 8 * n; item += kDim) {
    const Eight in = codec::load_eight(rows + item * 8);
    std::uint16_t* to =
        tile.values + item / (kDim / 8) * RawTile<kDim>::kStride + item % (kDim / 8) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = element(in.at[i]);
  }
  __syncthreads();
  for (int item = thread; item < kDim / 8 * capacity; item += kDim) {
    Eight out;
    int channel = item * 8 / capacity;
    int token = item * 8 % capacity;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out.at[i] =
          token < n ? tile.values[token * RawTile<kDim>::kStride + channel] : std::uint16_t{0};
      if (++token == capacity) {
        token = 0;
        ++channel;
      }
    }
    codec::store_eight(block.codes + item * 16, out);
  }
}

template <int kDim>
__device__ void encode_groups(const DeviceEncode& block, const LloydTable& lloyd,
                              CodeTile<kDim>& tile) {
  const Place<kDim> place;
  float y[kGroup] = {};
  if (place.token < block.n) {
    codec::load_group(reinterpret_cast<const std::uint16_t*>(block.rows) + place.token * kDim +
                          place.group * kGroup,
                      y);
  }
  std::uint32_t codes[kGroup / 4];
  switch (block.format) {
    case KvFormat::kInt4:
      encode_int4<kDim>(block, y, codes);
      break;
    case KvFormat::kKivi4:
      encode_kivi_values<kDim>(block, 15.0F, y, codes);
      break;
    case KvFormat::kKivi2:
      encode_kivi_values<kDim>(block, 3.0F, y, codes);
      break;
    case KvFormat::kLloyd1:
      encode_lloyd<kDim, 1>(block, lloyd, y, codes);
      break;
    case KvFormat::kLloyd2:
      encode_lloyd<kDim, 2>(block, lloyd, y, codes);
      break;
    case KvFormat::kLloyd3:
      encode_lloyd<kDim, 3>(block, lloyd, y, codes);
      break;
    default:
      encode_lloyd<kDim, 4>(block, lloyd, y, codes);
      break;
  }
  std::uint32_t* out = tile.group(place.token, place.group);
#pragma unroll
  for (int i = 0; i < kGroup / 4; ++i) out[i] = place.token < block.n ? codes[i] : 0U;
}

template <int kDim>
__global__ void __launch_bounds__(kDim) encode_kernel(const DeviceEncode* blocks, bool raw_is_bf16,
                                                      const __grid_constant__ LloydTable lloyd) {
  __shared__ union {
    CodeTile<kDim> codes;
    RawTile<kDim> raw;
  } tile;
  const DeviceEncode block = blocks[blockIdx.x];
  if (block.format == KvFormat::kRaw) {
    if (raw_is_bf16) {
      encode_raw<kDim, true>(block, tile.raw);
    } else {
      encode_raw<kDim, false>(block, tile.raw);
    }
    return;
  }
  const bool is_kivi = block.format == KvFormat::kKivi4 || block.format == KvFormat::kKivi2;
  if (is_kivi && block.side == KvSide::kKey) {
    encode_kivi_keys<kDim>(block, block.format == KvFormat::kKivi4 ? 15.0F : 3.0F, tile.codes);
  } else {
    encode_groups<kDim>(block, lloyd, tile.codes);
  }
  __syncthreads();
  const int bits = codec::code_bits(block.format);
  if (block.side == KvSide::kKey) {
    codec::pack_codes<kDim, KvSide::kKey>(tile.codes, bits, block.codes);
  } else {
    codec::pack_codes<kDim, KvSide::kValue>(tile.codes, bits, block.codes);
  }
}

}  // namespace

void kv_encode(const CudaContext& context, int head_dim, DType raw, const DeviceEncode* blocks,
               int n_blocks) {
  CHECK(head_dim == 64 || head_dim == 128, "head_dim");
  CHECK(raw != DType::kF32, "raw pieces of 16-bit elements");
  CHECK(n_blocks >= 0, "kv_encode count");
  if (n_blocks == 0) return;
  const LloydTable lloyd = lloyd_table();
  const bool is_bf16 = raw == DType::kBF16;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(n_blocks), static_cast<unsigned>(head_dim), 0,
             context.stream()>>>(blocks, is_bf16, lloyd);
  };
  if (head_dim == 64) {
    launch(encode_kernel<64>);
  } else {
    launch(encode_kernel<128>);
  }
  check_launch("kv_encode");
}

}  // namespace spindle::kernels
