#include <cuda_runtime.h>

#include <algorithm>
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
using codec::kGroup;

struct Expand {
  const DeviceSequence* sequences;
  std::int64_t first_head;  // of the layer, in the heads of a sequence
  int n_kv_heads;
  const std::byte* pool;
  const float* cos;
  const float* sin;
  std::byte* pages;
  const std::int64_t* first_page;
};

struct Levels {
  float at[4][16];  // of bits - 1
};

// Decoded rows. A thread writes its group of 32 channels, then reads eight channels of a token or
// eight tokens of a channel, of every group; the strides keep all three free of bank conflicts.
template <int kDim>
struct RowTile {
  static constexpr int kGroups = kDim / kGroup;
  static constexpr int kGroupStride = kGroup + 32 / kGroups;
  static constexpr int kStride = kGroups * kGroupStride + 1;
  float values[kKvBlockTokens * kStride];

  __device__ float& at(int token, int group, int i) {
    return values[token * kStride + group * kGroupStride + i];
  }
};

template <int kDim>
struct ExpandShared {
  RowTile<kDim> rows;
  CodeTile<kDim> codes;
  float levels[16];
};

// One side of one block.
struct Side {
  KvFormat format;
  const std::byte* codes;
  const std::byte* scales;
  const std::uint16_t* mean;
  const std::uint32_t* entries;  // places of chunks
  const std::uint16_t* tokens;
  std::int64_t token_stride;
  bool wide_ids;
};

__device__ const std::byte* at_place(const std::byte* pool, std::uint32_t place) {
  return pool + std::int64_t{place} * kKvPlaceBytes;
}

template <KvSide kSide>
__device__ Side side_of(const std::byte* pool, const DeviceKvHead& head,
                        const DeviceKvBlock& block) {
  constexpr bool kKey = kSide == KvSide::kKey;
  Side side;
  side.format = kKey ? block.k_format : block.v_format;
  // V shares the token ids of K.
  const bool ids = side.format == KvFormat::kToken;
  side.codes = at_place(pool, kKey || ids ? block.k_codes : block.v_codes);
  side.scales = at_place(pool, kKey ? block.k_scales : block.v_scales);
  side.mean =
      reinterpret_cast<const std::uint16_t*>(at_place(pool, kKey ? head.k_mean : head.v_mean));
  side.entries = kKey ? head.k_entries : head.v_entries;
  side.tokens = kKey ? head.k_tokens : head.v_tokens;
  side.token_stride = head.token_stride;
  side.wide_ids = head.wide_ids != 0;
  return side;
}

__device__ __forceinline__ bool in_hadamard_basis(KvFormat format) {
  return format == KvFormat::kInt4 || codec::has_lloyd_levels(format);
}
__device__ __forceinline__ bool before_rope(KvFormat format) {
  return format == KvFormat::kCodebook || format == KvFormat::kToken ||
         codec::has_lloyd_levels(format);
}

__device__ __forceinline__ unsigned code_of(const std::uint32_t* words, int i) {
  return (words[i / 4] >> (8 * (i % 4))) & 0xffU;
}

__device__ __forceinline__ float stepped(unsigned code, float scale, float minimum) {
  return __fadd_rn(__fmul_rn(static_cast<float>(code), scale), minimum);
}

// The thread's 32 values of a coded side, in the Hadamard basis half way back: finish() has the
// rest. The operations and their order are those of kv_decode.
template <int kDim, KvSide kSide>
__device__ void decode_codes(const Side& side, int token, int group, ExpandShared<kDim>& shared,
                             float (&y)[kGroup]) {
  const int bits = codec::code_bits(side.format);
  codec::unpack_codes<kDim, kSide>(side.codes, bits, shared.codes);
  const std::uint32_t* words = shared.codes.group(token, group);
  const auto* scales = reinterpret_cast<const std::uint16_t*>(side.scales);
  if (codec::has_lloyd_levels(side.format)) {
    const float scale = codec::f16_value(scales[token]);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) y[i] = __fmul_rn(shared.levels[code_of(words, i)], scale);
    codec::hadamard_in_group(y);
    return;
  }
  if (side.format == KvFormat::kInt4) {
    const float scale = codec::f16_value(scales[token]);
    const float minimum = codec::f16_value(scales[kKvBlockTokens + token]);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) y[i] = stepped(code_of(words, i), scale, minimum);
    codec::hadamard_in_group(y);
    return;
  }
  if constexpr (kSide == KvSide::kKey) {
    // KIVI's K has its steps per channel.
    float minimum[kGroup];
    codec::load_group(scales + group * kGroup, y);
    codec::load_group(scales + kDim + group * kGroup, minimum);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) y[i] = stepped(code_of(words, i), y[i], minimum[i]);
  } else {
    const float scale = codec::f16_value(scales[group * kKvBlockTokens + token]);
    const float minimum = codec::f16_value(scales[kDim + group * kKvBlockTokens + token]);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) y[i] = stepped(code_of(words, i), scale, minimum);
  }
}

template <int kDim>
__device__ void decode_entry(const Side& side, const std::byte* pool, int token, int group,
                             float (&y)[kGroup]) {
  const int entry = reinterpret_cast<const std::uint16_t*>(side.codes)[token];
  const float magnitude =
      codec::f16_value(reinterpret_cast<const std::uint16_t*>(side.scales)[token]);
  const auto* chunk = reinterpret_cast<const std::uint16_t*>(
      at_place(pool, side.entries[entry / kCodebookChunkEntries]));
  codec::load_group(chunk + entry % kCodebookChunkEntries * kDim + group * kGroup, y);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) y[i] = __fmul_rn(y[i], magnitude);
}

__device__ void decode_token(const Side& side, int token, int group, float (&y)[kGroup]) {
  const std::int64_t id = side.wide_ids ? reinterpret_cast<const std::uint32_t*>(side.codes)[token]
                                        : reinterpret_cast<const std::uint16_t*>(side.codes)[token];
  // Rows of the model's own table need not be aligned.
  const std::uint16_t* row = side.tokens + id * side.token_stride + group * kGroup;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) y[i] = codec::f16_value(row[i]);
}

// The visible tokens' rows to shared memory.
template <int kDim, KvSide kSide>
__device__ void decode_rows(const Side& side, const std::byte* pool, int first, int end,
                            ExpandShared<kDim>& shared) {
  const int token = static_cast<int>(threadIdx.x) / (kDim / kGroup);
  const int group = static_cast<int>(threadIdx.x) % (kDim / kGroup);
  const bool visible = token >= first && token < end;
  float y[kGroup] = {};
  if (side.format == KvFormat::kCodebook) {
    if (visible) decode_entry<kDim>(side, pool, token, group, y);
  } else if (side.format == KvFormat::kToken) {
    if (visible) decode_token(side, token, group, y);
  } else {
    decode_codes<kDim, kSide>(side, token, group, shared, y);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) shared.rows.at(token, group, i) = y[i];
  __syncthreads();
}

__device__ std::int64_t position_of(const std::byte* pool, const DeviceKvHead& head,
                                    const DeviceKvBlock& block, int token) {
  if (block.positions == kNoPlace) return std::int64_t{block.first_position} + token;
  const std::byte* positions = at_place(pool, block.positions);
  if (head.wide_positions != 0) return reinterpret_cast<const std::uint32_t*>(positions)[token];
  return reinterpret_cast<const std::uint16_t*>(positions)[token];
}

__device__ __forceinline__ void load_floats(const float* from, float (&to)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// Eight values of every group, at the same place of each.
template <int kDim>
using Eights = float[kDim / kGroup][8];

// The stages of the Hadamard transform across groups.
template <int kDim>
__device__ __forceinline__ void finish_hadamard(Eights<kDim>& x) {
  constexpr int kGroups = kDim / kGroup;
  const float scale = codec::hadamard_scale<kDim>();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int h = 1; h < kGroups; h *= 2) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if ((j & h) != 0) continue;
        const float a = x[j][i];
        const float b = x[j + h][i];
        x[j][i] = __fadd_rn(a, b);
        x[j + h][i] = __fsub_rn(a, b);
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) x[j][i] = __fmul_rn(x[j][i], scale);
  }
}

// RoPE of a token's channels, eight of every group from `first` on. Products are rounded before
// they are added, as in rope.h.
template <int kDim>
__device__ __forceinline__ void rotate(const Expand& a, std::int64_t position, int first,
                                       Eights<kDim>& x) {
  constexpr int kHalf = kDim / kGroup / 2;  // groups
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    float cos[8];
    float sin[8];
    load_floats(a.cos + position * (kDim / 2) + j * kGroup + first, cos);
    load_floats(a.sin + position * (kDim / 2) + j * kGroup + first, sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float low = x[j][i];
      const float high = x[j + kHalf][i];
      x[j][i] = __fsub_rn(__fmul_rn(low, cos[i]), __fmul_rn(high, sin[i]));
      x[j + kHalf][i] = __fadd_rn(__fmul_rn(high, cos[i]), __fmul_rn(low, sin[i]));
    }
  }
}

template <bool kIsBf16>
__device__ __forceinline__ std::uint16_t page_element(float value) {
  return codec::narrowed<kIsBf16>(kIsBf16 ? value : codec::saturated(value));
}

template <int kDim, bool kIsBf16>
__device__ void write_keys(const Expand& a, const DeviceKvHead& head, const DeviceKvBlock& block,
                           const Side& side, ExpandShared<kDim>& shared, std::byte* page) {
  constexpr int kGroups = kDim / kGroup;
  for (int item = static_cast<int>(threadIdx.x); item < 4 * kKvBlockTokens; item += kDim) {
    const int token = item / 4;
    const int first = item % 4 * 8;
    const bool visible = token >= block.first && token < block.end;
    Eights<kDim> x;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[j][i] = shared.rows.at(token, j, first + i);
    }
    if (in_hadamard_basis(side.format)) finish_hadamard<kDim>(x);
    if (codec::has_lloyd_levels(side.format)) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const Eight mean = codec::load_eight(side.mean + j * kGroup + first);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[j][i] = __fadd_rn(x[j][i], codec::f16_value(mean.at[i]));
      }
    }
    if (visible && before_rope(side.format)) {
      rotate<kDim>(a, position_of(a.pool, head, block, token), first, x);
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      Eight out;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out.at[i] = visible ? page_element<kIsBf16>(x[j][i]) : std::uint16_t{0};
      }
      codec::store_eight(page + ((j * kKvBlockTokens + token) * kGroup + first) * 2, out);
    }
  }
}

template <int kDim, bool kIsBf16>
__device__ void write_values(const DeviceKvBlock& block, const Side& side,
                             ExpandShared<kDim>& shared, std::byte* page) {
  constexpr int kGroups = kDim / kGroup;
  for (int item = static_cast<int>(threadIdx.x); item < 4 * kGroup; item += kDim) {
    const int channel = item / 4;  // of every group
    const int first = item % 4 * 8;
    Eights<kDim> x;  // of tokens
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[j][i] = shared.rows.at(first + i, j, channel);
    }
    if (in_hadamard_basis(side.format)) finish_hadamard<kDim>(x);
    if (codec::has_lloyd_levels(side.format)) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const float mean = codec::f16_value(side.mean[j * kGroup + channel]);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[j][i] = __fadd_rn(x[j][i], mean);
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      Eight out;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool visible = first + i >= block.first && first + i < block.end;
        out.at[i] = visible ? page_element<kIsBf16>(x[j][i]) : std::uint16_t{0};
      }
      codec::store_eight(page + ((j * kGroup + channel) * kKvBlockTokens + first) * 2, out);
    }
  }
}

// A raw side: rows of 32 channels or of `capacity` tokens into rows of 32, bits as they are.
template <int kDim, KvSide kSide>
__device__ void copy_raw(const std::byte* codes, const DeviceKvBlock& block, std::byte* page) {
  const auto* in = reinterpret_cast<const std::uint16_t*>(codes);
  const int capacity = block.capacity;
  for (int item = static_cast<int>(threadIdx.x); item < kDim * 4; item += kDim) {
    Eight out{};
    if constexpr (kSide == KvSide::kKey) {
      const int token = item / 4 % kKvBlockTokens;
      const int panel = item / (4 * kKvBlockTokens);
      if (token >= block.first && token < block.end) {
        out = codec::load_eight(in + (panel * capacity + token) * 32 + item % 4 * 8);
      }
    } else {
      const int token = item % 4 * 8;
      const std::uint16_t* row = in + item / 4 * capacity;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (token + i >= block.first && token + i < block.end) out.at[i] = row[token + i];
      }
    }
    codec::store_eight(page + item * 16, out);
  }
}

template <int kDim, bool kIsBf16, KvSide kSide>
__device__ void expand_side(const Expand& a, const Levels& levels, const DeviceKvHead& head,
                            const DeviceKvBlock& block, std::byte* page,
                            ExpandShared<kDim>& shared) {
  const Side side = side_of<kSide>(a.pool, head, block);
  if (side.format == KvFormat::kRaw) return copy_raw<kDim, kSide>(side.codes, block, page);
  if (codec::has_lloyd_levels(side.format) && threadIdx.x < 16) {
    // unpack_codes synchronises before they are read.
    shared.levels[threadIdx.x] = levels.at[codec::code_bits(side.format) - 1][threadIdx.x];
  }
  decode_rows<kDim, kSide>(side, a.pool, block.first, block.end, shared);
  if constexpr (kSide == KvSide::kKey) {
    write_keys<kDim, kIsBf16>(a, head, block, side, shared, page);
  } else {
    write_values<kDim, kIsBf16>(block, side, shared, page);
  }
}

// Side blockIdx.z of block blockIdx.x of (sequence, kv head) blockIdx.y.
template <int kDim, bool kIsBf16>
__global__ void __launch_bounds__(kDim)
    expand_kernel(const __grid_constant__ Expand a, const __grid_constant__ Levels levels) {
  __shared__ ExpandShared<kDim> shared;
  const int pair = static_cast<int>(blockIdx.y);
  const DeviceSequence& sequence = a.sequences[pair / a.n_kv_heads];
  if (sequence.n_queries == 0) return;
  const DeviceKvHead& head = sequence.heads[a.first_head + pair % a.n_kv_heads];
  const int index = static_cast<int>(blockIdx.x);
  if (index >= head.n_blocks) return;
  const DeviceKvBlock block = head.blocks[index];
  constexpr std::int64_t kSideBytes = std::int64_t{2} * kDim * kKvPageTokens;
  std::byte* page = a.pages + (a.first_page[pair] + index) * 2 * kSideBytes;
  if (blockIdx.z == 0) {
    expand_side<kDim, kIsBf16, KvSide::kKey>(a, levels, head, block, page, shared);
  } else {
    expand_side<kDim, kIsBf16, KvSide::kValue>(a, levels, head, block, page + kSideBytes, shared);
  }
}

}  // namespace

void kv_expand(const CudaContext& context, const DeviceSequence* sequences, int n_sequences,
               int layer, const AttentionShape& shape, const DeviceKvPool& pool,
               const DeviceRope& rope, std::int32_t max_blocks, const DeviceExpandedBlocks& out) {
  const int d = shape.head_dim;
  CHECK((d == 64 || d == 128) && pool.layout.head_dim == d &&
            pool.layout.page_tokens == kKvPageTokens,
        "kv_expand head_dim");
  CHECK(pool.layout.dtype != DType::kF32, "pages of 16-bit elements");
  CHECK(rope.cos == nullptr || rope.rotary_dim == d, "blocks before RoPE need whole heads rotated");
  const std::int64_t n_pairs = std::int64_t{n_sequences} * shape.n_kv_heads;
  CHECK(n_sequences >= 0 && shape.n_kv_heads > 0 && n_pairs < 65536 && max_blocks >= 0,
        "kv_expand counts");
  if (n_pairs == 0 || max_blocks == 0) return;

  Levels levels{};
  for (int bits = 1; bits <= 4; ++bits) {
    const float* from = lloyd_levels(bits).data();
    std::copy_n(from, std::size_t{1} << bits, levels.at[bits - 1]);
  }
  const Expand a{sequences,        std::int64_t{layer} * shape.n_kv_heads,
                 shape.n_kv_heads, pool.base,
                 rope.cos,         rope.sin,
                 out.pages,        out.first_page};
  const dim3 grid(static_cast<unsigned>(max_blocks), static_cast<unsigned>(n_pairs), 2);
  const bool is_bf16 = pool.layout.dtype == DType::kBF16;
  const auto launch = [&](auto kernel) {
    kernel<<<grid, static_cast<unsigned>(d), 0, context.stream()>>>(a, levels);
  };
  if (d == 64) {
    is_bf16 ? launch(expand_kernel<64, true>) : launch(expand_kernel<64, false>);
  } else {
    is_bf16 ? launch(expand_kernel<128, true>) : launch(expand_kernel<128, false>);
  }
  check_launch("kv_expand");
}

}  // namespace spindle::kernels
