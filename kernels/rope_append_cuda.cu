#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/kv_codec.cuh"

namespace spindle::kernels {
namespace {

using codec::Eight;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Of one lane. Each is a sector of its own in a decode step: few, so that they spread over the SMs.
constexpr int kValueChannels = 4;

struct alignas(sizeof(float) * kValueChannels) Values {
  float at[kValueChannels];
};

struct Append {
  const float* qkv;
  std::int64_t qkv_stride;
  const std::int32_t* row_sequence;
  const std::int32_t* positions;
  const DeviceSequence* sequences;
  std::int64_t first_head;  // of the layer, in the heads of a sequence
  int n_rows;
  int n_heads;
  int n_kv_heads;
  int half;  // rotary_dim / 2
  const float* cos;
  const float* sin;
  std::byte* pool;
  std::int64_t page_bytes;
  std::uint16_t* q;  // f16
  std::int64_t q_stride;
  int n_value_blocks;
};

struct Slot {
  std::byte* page;
  int token;
};

__device__ Slot slot_of(const Append& a, int sequence, int kv_head, int position) {
  const DeviceKvHead& head = a.sequences[sequence].heads[a.first_head + kv_head];
  const int offset = position - head.tail_origin;
  return {a.pool + head.pages[offset / kKvPageTokens] * a.page_bytes, offset % kKvPageTokens};
}

// One warp: a few channels of V of one head for 32 rows. A page has the tokens of a channel side by
// side, so rows of one sequence make whole runs, and rows of 32 sequences cost what they must.
template <int kDim, bool kIsBf16>
__device__ void append_values(const Append& a, int warp, int lane) {
  constexpr int kChunks = kDim / kValueChannels;
  const int chunk = warp % kChunks;
  const int head = warp / kChunks % a.n_kv_heads;
  const int row = warp / kChunks / a.n_kv_heads * 32 + lane;
  if (row >= a.n_rows) return;
  const int sequence = a.row_sequence[row];
  if (sequence < 0) return;
  const std::int64_t column = static_cast<std::int64_t>(a.n_heads + a.n_kv_heads + head) * kDim;
  const Values values = *reinterpret_cast<const Values*>(a.qkv + row * a.qkv_stride + column +
                                                         chunk * kValueChannels);
  const Slot slot = slot_of(a, sequence, head, a.positions[row]);
  auto* out = reinterpret_cast<std::uint16_t*>(slot.page) + kDim * kKvPageTokens +
              chunk * kValueChannels * kKvPageTokens + slot.token;
#pragma unroll
  for (int i = 0; i < kValueChannels; ++i) {
    out[i * kKvPageTokens] = codec::narrowed<kIsBf16>(values.at[i]);
  }
}

__device__ __forceinline__ void load_floats(const float* from, float (&to)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
  to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

template <bool kIsBf16>
__device__ __forceinline__ Eight narrow_eight(const float (&values)[8]) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.at[i] = codec::narrowed<kIsBf16>(values[i]);
  return out;
}

// One thread: sixteen channels of a head of q or k, eight and the eight they are rotated with; of
// the channels beyond rotary_dim any sixteen.
template <int kDim, bool kIsBf16>
__device__ void append_rotated(const Append& a, int item) {
  constexpr int kItems = kDim / 16;
  const int n_heads = a.n_heads + a.n_kv_heads;
  const int part = item % kItems;
  const int head = item / kItems % n_heads;
  const int row = item / kItems / n_heads;
  if (row >= a.n_rows) return;
  const int sequence = a.row_sequence[row];
  if (sequence < 0) return;
  const int position = a.positions[row];
  const bool rotated = part * 8 < a.half;
  const int low = rotated ? part * 8 : 2 * a.half + (part - a.half / 8) * 16;
  const int high = rotated ? low + a.half : low + 8;

  const float* in = a.qkv + row * a.qkv_stride + head * kDim;
  float x[8];
  float y[8];
  load_floats(in + low, x);
  load_floats(in + high, y);
  if (rotated) {
    const std::int64_t at = static_cast<std::int64_t>(position) * a.half + low;
    float cos[8];
    float sin[8];
    load_floats(a.cos + at, cos);
    load_floats(a.sin + at, sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float first = x[i] * cos[i] - y[i] * sin[i];
      y[i] = y[i] * cos[i] + x[i] * sin[i];
      x[i] = first;
    }
  }
  if (head < a.n_heads) {
    std::uint16_t* out = a.q + row * a.q_stride + head * kDim;
    codec::store_eight(out + low, narrow_eight<false>(x));
    codec::store_eight(out + high, narrow_eight<false>(y));
    return;
  }
  const Slot slot = slot_of(a, sequence, head - a.n_heads, position);
  auto* out = reinterpret_cast<std::uint16_t*>(slot.page);
  const auto place = [&](int channel) {
    return out + (channel / 32 * kKvPageTokens + slot.token) * 32 + channel % 32;
  };
  codec::store_eight(place(low), narrow_eight<kIsBf16>(x));
  codec::store_eight(place(high), narrow_eight<kIsBf16>(y));
}

template <int kDim, bool kIsBf16>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(const Append a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  if (block < a.n_value_blocks) {
    append_values<kDim, kIsBf16>(a, block * kWarps + thread / 32, thread % 32);
  } else {
    append_rotated<kDim, kIsBf16>(a, (block - a.n_value_blocks) * kThreads + thread);
  }
}

}  // namespace

void rope_append(const CudaContext& context, const DeviceRope& rope, ConstRows qkv,
                 const std::int32_t* row_sequence, const std::int32_t* positions,
                 const DeviceSequence* sequences, int layer, const AttentionShape& shape,
                 const DeviceKvPool& pool, F16Rows q) {
  const int d = shape.head_dim;
  CHECK((d == 64 || d == 128) && pool.layout.head_dim == d &&
            pool.layout.page_tokens == kKvPageTokens,
        "rope_append head_dim");
  CHECK(pool.layout.dtype != DType::kF32, "pages of 16-bit elements");
  CHECK(shape.n_kv_heads > 0 && shape.n_heads > 0 && shape.n_heads % shape.n_kv_heads == 0,
        "rope_append heads");
  CHECK(qkv.width == std::int64_t{shape.n_heads + 2 * shape.n_kv_heads} * d &&
            q.width == std::int64_t{shape.n_heads} * d && q.n_rows == qkv.n_rows,
        "rope_append rows");
  CHECK(qkv.stride % 4 == 0 && q.stride % 8 == 0, "rows of whole 16 bytes");
  CHECK(rope.rotary_dim <= d && rope.rotary_dim % 16 == 0, "rotary_dim is a multiple of 16");
  if (qkv.n_rows == 0) return;
  const std::int64_t value_warps = (qkv.n_rows + 31) / 32 * shape.n_kv_heads * (d / kValueChannels);
  const std::int64_t items = qkv.n_rows * (shape.n_heads + shape.n_kv_heads) * (d / 16);
  CHECK(items < (std::int64_t{1} << 30) && value_warps < (std::int64_t{1} << 30),
        "rows of one step");

  Append a{};
  a.qkv = qkv.data;
  a.qkv_stride = qkv.stride;
  a.row_sequence = row_sequence;
  a.positions = positions;
  a.sequences = sequences;
  a.first_head = std::int64_t{layer} * shape.n_kv_heads;
  a.n_rows = static_cast<int>(qkv.n_rows);
  a.n_heads = shape.n_heads;
  a.n_kv_heads = shape.n_kv_heads;
  a.half = rope.rotary_dim / 2;
  a.cos = rope.cos;
  a.sin = rope.sin;
  a.pool = pool.base;
  a.page_bytes = static_cast<std::int64_t>(pool.page_bytes());
  a.q = reinterpret_cast<std::uint16_t*>(q.data);
  a.q_stride = q.stride;
  a.n_value_blocks = static_cast<int>((value_warps + kWarps - 1) / kWarps);
  const dim3 grid(static_cast<unsigned>(a.n_value_blocks + (items + kThreads - 1) / kThreads));
  const bool is_bf16 = pool.layout.dtype == DType::kBF16;
  const auto launch = [&](auto kernel) {
    launch_chained(context, "rope_append", kernel, grid, dim3(kThreads), 0, a);
  };
  if (d == 64) {
    is_bf16 ? launch(rope_append_kernel<64, true>) : launch(rope_append_kernel<64, false>);
  } else {
    is_bf16 ? launch(rope_append_kernel<128, true>) : launch(rope_append_kernel<128, false>);
  }
}

}  // namespace spindle::kernels
