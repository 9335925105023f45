#pragma once
// What the kernels share that write and read coded blocks: one warp-level layout of a block's rows,
// the Hadamard transform in the CPU body's order, and codes between registers and planes.
//
// A CTA of head_dim threads holds the 32 tokens of one side: thread i has the channels
// [32 g, 32 g + 32), g = i % (head_dim / 32), of token i / (head_dim / 32), so that a token is 2 or
// 4 neighbouring lanes. Sums and products are rounded one by one (no contraction): codes and scales
// must be those of kv_quant_cpu.cc.
//
// For CUDA translation units only.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/kv_device.h"

namespace spindle::kernels::codec {

inline constexpr int kGroup = 32;  // channels of one thread
inline constexpr unsigned kAllLanes = 0xffffffffU;

__device__ __forceinline__ float f16_value(std::uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ float saturated(float value) {
  if (value < -65504.0F) return -65504.0F;
  return value > 65504.0F ? 65504.0F : value;
}
__device__ __forceinline__ std::uint16_t f16_bits(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ std::uint16_t saturated_f16(float value) {
  return f16_bits(saturated(value));
}

// Elements of pages and raw blocks.
template <bool kIsBf16>
__device__ __forceinline__ float widened(std::uint16_t bits) {
  if constexpr (kIsBf16) return __bfloat162float(__ushort_as_bfloat16(bits));
  return f16_value(bits);
}
template <bool kIsBf16>
__device__ __forceinline__ std::uint16_t narrowed(float value) {
  if constexpr (kIsBf16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return f16_bits(value);
}

// Eight 16-bit elements of 16 bytes.
struct alignas(16) Eight {
  std::uint16_t at[8];
};

__device__ __forceinline__ Eight load_eight(const void* from) {
  return *static_cast<const Eight*>(from);
}
__device__ __forceinline__ void store_eight(void* to, const Eight& value) {
  *static_cast<Eight*>(to) = value;
}

// 32 f16 at a 16-byte aligned address.
__device__ __forceinline__ void load_group(const std::uint16_t* from, float (&y)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; i += 8) {
    const Eight eight = load_eight(from + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) y[i + j] = f16_value(eight.at[j]);
  }
}

// The stages of the transform inside a group of 32 channels, before those across groups.
__device__ __forceinline__ void hadamard_in_group(float (&y)[kGroup]) {
#pragma unroll
  for (int h = 1; h < kGroup; h *= 2) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if ((i & h) != 0) continue;
      const float a = y[i];
      const float b = y[i + h];
      y[i] = __fadd_rn(a, b);
      y[i + h] = __fsub_rn(a, b);
    }
  }
}

template <int kDim>
__device__ __forceinline__ float hadamard_scale() {
  return __fdiv_rn(1.0F, __fsqrt_rn(static_cast<float>(kDim)));
}

// x H / sqrt(head_dim) of every token. All lanes take part.
template <int kDim>
__device__ __forceinline__ void hadamard(float (&y)[kGroup]) {
  hadamard_in_group(y);
#pragma unroll
  for (int lanes = 1; lanes < kDim / kGroup; lanes *= 2) {
    // other + y in the lower lane, other - y in the upper one; the product is exact.
    const float sign = (threadIdx.x & static_cast<unsigned>(lanes)) != 0 ? -1.0F : 1.0F;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      y[i] = __fmaf_rn(sign, y[i], __shfl_xor_sync(kAllLanes, y[i], lanes));
    }
  }
  const float scale = hadamard_scale<kDim>();
#pragma unroll
  for (int i = 0; i < kGroup; ++i) y[i] = __fmul_rn(y[i], scale);
}

// Codes of a block, one byte each, between the layout of threads and that of planes. Rows are
// padded by a word so that neither side of the exchange meets in one bank.
template <int kDim>
struct CodeTile {
  static constexpr int kStride = kDim + 4;
  alignas(16) std::uint8_t codes[kKvBlockTokens * kStride];

  __device__ std::uint8_t& at(int token, int channel) { return codes[token * kStride + channel]; }
  __device__ std::uint32_t* group(int token, int group) {
    return reinterpret_cast<std::uint32_t*>(codes + token * kStride + group * kGroup);
  }
};

// The words of this thread in a plane: kBits of them from kBits * threadIdx.x on.
template <int kBits>
struct alignas(4 * kBits) PlaneWords {
  std::uint32_t at[kBits];
};

// Bits [kShift, kShift + kBits) of all codes to one plane.
template <int kDim, KvSide kSide, int kBits, int kShift>
__device__ __forceinline__ void pack_plane(CodeTile<kDim>& tile, std::byte* plane) {
  PlaneWords<kBits> words;
#pragma unroll
  for (int k = 0; k < kBits; ++k) {
    words.at[k] = 0;
#pragma unroll
    for (int index = 0; index < 32 / kBits; ++index) {
      const KvElement e =
          kv_code_element(kSide, kBits, kDim, static_cast<int>(threadIdx.x) * kBits + k, index);
      const unsigned code = tile.at(e.token, e.channel);
      words.at[k] |= ((code >> kShift) & ((1U << kBits) - 1U)) << (index * kBits);
    }
  }
  reinterpret_cast<PlaneWords<kBits>*>(plane)[threadIdx.x] = words;
}

// One plane into the codes' bits from kShift on. Planes with a shift add to what is in the tile.
template <int kDim, KvSide kSide, int kBits, int kShift>
__device__ __forceinline__ void unpack_plane(const std::byte* plane, CodeTile<kDim>& tile) {
  const PlaneWords<kBits> words = reinterpret_cast<const PlaneWords<kBits>*>(plane)[threadIdx.x];
#pragma unroll
  for (int k = 0; k < kBits; ++k) {
#pragma unroll
    for (int index = 0; index < 32 / kBits; ++index) {
      const KvElement e =
          kv_code_element(kSide, kBits, kDim, static_cast<int>(threadIdx.x) * kBits + k, index);
      const unsigned code = (words.at[k] >> (index * kBits)) & ((1U << kBits) - 1U);
      std::uint8_t& at = tile.at(e.token, e.channel);
      if constexpr (kShift == 0) {
        at = static_cast<std::uint8_t>(code);
      } else {
        at = static_cast<std::uint8_t>(at | (code << kShift));
      }
    }
  }
}

// Three bits are a plane of the two low bits, then one of the high bit.
template <int kDim, KvSide kSide, int kBits>
__device__ __forceinline__ void pack_codes(CodeTile<kDim>& tile, std::byte* codes) {
  if constexpr (kBits == 3) {
    pack_plane<kDim, kSide, 2, 0>(tile, codes);
    pack_plane<kDim, kSide, 1, 2>(tile, codes + 8 * kDim);
  } else {
    pack_plane<kDim, kSide, kBits, 0>(tile, codes);
  }
}

template <int kDim, KvSide kSide>
__device__ void pack_codes(CodeTile<kDim>& tile, int bits, std::byte* codes) {
  switch (bits) {
    case 1:
      return pack_codes<kDim, kSide, 1>(tile, codes);
    case 2:
      return pack_codes<kDim, kSide, 2>(tile, codes);
    case 3:
      return pack_codes<kDim, kSide, 3>(tile, codes);
    default:
      return pack_codes<kDim, kSide, 4>(tile, codes);
  }
}

// Ends with the tile complete for all threads.
template <int kDim, KvSide kSide>
__device__ void unpack_codes(const std::byte* codes, int bits, CodeTile<kDim>& tile) {
  switch (bits) {
    case 1:
      unpack_plane<kDim, kSide, 1, 0>(codes, tile);
      break;
    case 2:
      unpack_plane<kDim, kSide, 2, 0>(codes, tile);
      break;
    case 3:
      unpack_plane<kDim, kSide, 2, 0>(codes, tile);
      __syncthreads();
      unpack_plane<kDim, kSide, 1, 2>(codes + 8 * kDim, tile);
      break;
    default:
      unpack_plane<kDim, kSide, 4, 0>(codes, tile);
      break;
  }
  __syncthreads();
}

// Bits of a code; 0 for formats without codes.
__device__ __forceinline__ int code_bits(KvFormat format) {
  switch (format) {
    case KvFormat::kInt4:
    case KvFormat::kKivi4:
    case KvFormat::kLloyd4:
      return 4;
    case KvFormat::kKivi2:
    case KvFormat::kLloyd2:
      return 2;
    case KvFormat::kLloyd3:
      return 3;
    case KvFormat::kLloyd1:
      return 1;
    default:
      return 0;
  }
}
__device__ __forceinline__ bool has_lloyd_levels(KvFormat format) {
  return format >= KvFormat::kLloyd1 && format <= KvFormat::kLloyd4;
}

}  // namespace spindle::kernels::codec
