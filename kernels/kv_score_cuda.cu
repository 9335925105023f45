// Probabilities of the observation window and what is read from them. Design: the scores of a
// window (some hundred rows) against n tokens are bound by what is written, so the keys are read
// twice (row maxima and sums, then probabilities) and logits are never stored.
#include <algorithm>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/kv_score_device.cuh"

namespace spindle::kernels {
namespace {

using score::kUnitTokens;
using score::Layer;
using score::Unit;
using score::Units;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// Chunks of a head's units that blocks share; at least kMinUnits units each.
constexpr int kMaxChunks = 64;
constexpr int kMinUnits = 8;
constexpr float kLog2E = 1.4426950408889634F;

__device__ inline void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                               std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A pair of f16 as bf16 parts whose sum holds 16 bits of it.
struct SplitPair {
  std::uint32_t high;
  std::uint32_t low;
};
__device__ inline SplitPair split_pair(std::uint32_t pair) {
  const float2 value = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  const __nv_bfloat162 high = __floats2bfloat162_rn(value.x, value.y);
  const float2 rounded = __bfloat1622float2(high);
  const __nv_bfloat162 low = __floats2bfloat162_rn(value.x - rounded.x, value.y - rounded.y);
  return {*reinterpret_cast<const std::uint32_t*>(&high),
          *reinterpret_cast<const std::uint32_t*>(&low)};
}

// The scores of 16 kTiles rows (queries of one kv head's group) against units of 32 tokens, one
// warp. Rows are A, tokens are columns of B. Both give lane (g, q) the channels 32 j + 8 q .. + 7:
// a page's 16 bytes are then two steps of 16 channels, in an order of the channels that A shares.
// With bf16 pages the queries are a sum of two bf16 terms.
template <int kHeadDim, bool kBf16>
struct Scorer {
  static constexpr int kTiles = kBf16 ? 1 : 2;
  static constexpr int kTerms = kBf16 ? 2 : 1;
  static constexpr int kSteps = kHeadDim / 16;

  std::uint32_t a[kTerms][kTiles][kSteps][4];

  // Row r of the kv head is query r % n_queries of head r / n_queries of the group.
  __device__ void load(const Layer& layer, int kv_head, int first_row) {
    const int lane = threadIdx.x % 32;
    const int n_rows = layer.group * layer.n_queries;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 16 * tile + 8 * half + lane / 4;
        const int head = kv_head * layer.group + row / layer.n_queries;
        const F16* q =
            layer.q +
            (static_cast<std::int64_t>(row % layer.n_queries) * layer.n_heads + head) * kHeadDim +
            8 * (lane % 4);
#pragma unroll
        for (int j = 0; j < kHeadDim / 32; ++j) {
          uint4 words = make_uint4(0, 0, 0, 0);
          if (row < n_rows) words = *reinterpret_cast<const uint4*>(q + 32 * j);
          place(tile, 2 * j, half, words.x, words.y);
          place(tile, 2 * j + 1, half, words.z, words.w);
        }
      }
    }
  }

  // out[tile][8-token column tile][register]: rows lane / 4 and + 8, tokens 2 (lane % 4) and + 1.
  __device__ void scores(const std::byte* page, float (&out)[kTiles][4][4]) const {
    const int lane = threadIdx.x % 32;
    const auto* keys = reinterpret_cast<const uint4*>(page) + lane / 4 * 4 + lane % 4;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      uint4 b[kHeadDim / 32];
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        b[j] = keys[(j * kUnitTokens + 8 * column) * 4];
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float(&c)[4] = out[tile][column];
        c[0] = c[1] = c[2] = c[3] = 0.0F;
#pragma unroll
        for (int j = 0; j < kHeadDim / 32; ++j) {
#pragma unroll
          for (int term = 0; term < kTerms; ++term) {
            multiply(c, a[term][tile][2 * j], b[j].x, b[j].y);
            multiply(c, a[term][tile][2 * j + 1], b[j].z, b[j].w);
          }
        }
      }
    }
  }

 private:
  __device__ void place(int tile, int step, int half, std::uint32_t first, std::uint32_t second) {
    if constexpr (kBf16) {
      const SplitPair x = split_pair(first);
      const SplitPair y = split_pair(second);
      a[0][tile][step][half] = x.high;
      a[0][tile][step][2 + half] = y.high;
      a[1][tile][step][half] = x.low;
      a[1][tile][step][2 + half] = y.low;
    } else {
      a[0][tile][step][half] = first;
      a[0][tile][step][2 + half] = second;
    }
  }
  __device__ static void multiply(float (&c)[4], const std::uint32_t (&rows)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    if constexpr (kBf16) {
      mma_bf16(c, rows, b0, b1);
    } else {
      mma_f16(c, rows, b0, b1);
    }
  }
};

// How the warps of a block share its rows and its units: n_row_warps (a power of two) take rows
// apart, the others take turns at the units.
struct Share {
  std::int32_t first_row;
  std::int32_t turn;
  std::int32_t n_turns;
  std::int32_t begin;  // units
  std::int32_t end;
};

__host__ __device__ inline int row_warps(int n_rows, int rows_per_warp) {
  int warps = 1;
  while (warps < kWarps && warps * rows_per_warp < n_rows) warps *= 2;
  return warps;
}

// Grid: chunks, kv heads, groups of rows.
__device__ inline Share share_of(const Layer& layer, const Units& units, int rows_per_warp) {
  const int n_rows = layer.group * layer.n_queries;
  const int warps = row_warps(n_rows, rows_per_warp);
  const int warp = threadIdx.x / 32;
  const int per_chunk = (units.n_units + gridDim.x - 1) / gridDim.x;
  Share share;
  share.first_row = (blockIdx.z * warps + warp % warps) * rows_per_warp;
  share.turn = warp / warps;
  share.n_turns = kWarps / warps;
  share.begin = min(static_cast<int>(blockIdx.x) * per_chunk, units.n_units);
  share.end = min(share.begin + per_chunk, units.n_units);
  return share;
}

// Maximum (of scores times scale log2 e) and sum of a row's part, [rows][chunks * turns].
template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kThreads, 2)
    window_sums(const Layer layer, float scale_log2, float2* partial, int n_partials) {
  using Rows16 = Scorer<kHeadDim, kBf16>;
  constexpr int kTiles = Rows16::kTiles;
  const int kv_head = blockIdx.y;
  const DeviceKvHead& head = layer.head(kv_head);
  const Units units = score::units_of(head, layer.n_tokens);
  const Share share = share_of(layer, units, 16 * kTiles);
  const int n_rows = layer.group * layer.n_queries;
  if (share.first_row >= n_rows) return;
  const int lane = threadIdx.x % 32;
  Rows16 rows;
  rows.load(layer, kv_head, share.first_row);

  float best[kTiles][2];
  float sum[kTiles][2];
  int last[kTiles][2];  // the last position that the row sees
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = share.first_row + 16 * tile + 8 * half + lane / 4;
      best[tile][half] = -INFINITY;
      sum[tile][half] = 0.0F;
      last[tile][half] = layer.n_tokens - layer.n_queries + row % layer.n_queries;
    }
  }
  for (int index = share.begin + share.turn; index < share.end; index += share.n_turns) {
    const Unit unit = score::unit_at(layer, head, units, kv_head, index);
    float out[kTiles][4][4];
    rows.scores(unit.page, out);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int end = min(unit.end, last[tile][half] - unit.position + 1);
        float most = best[tile][half];
#pragma unroll
        for (int column = 0; column < 4; ++column) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int token = 8 * column + 2 * (lane % 4) + c;
            float& value = out[tile][column][2 * half + c];
            // A NaN stays one: it makes the row's sum NaN.
            value = token >= unit.begin && token < end ? value * scale_log2 : -INFINITY;
            most = fmaxf(most, value);
          }
        }
        const float shift = most == -INFINITY ? 0.0F : most;
        float added = 0.0F;
#pragma unroll
        for (int column = 0; column < 4; ++column) {
          added += exp2f(out[tile][column][2 * half] - shift);
          added += exp2f(out[tile][column][2 * half + 1] - shift);
        }
        sum[tile][half] = sum[tile][half] * exp2f(best[tile][half] - shift) + added;
        best[tile][half] = most;
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = best[tile][half];
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
      const float shift = most == -INFINITY ? 0.0F : most;
      float total = sum[tile][half] * exp2f(best[tile][half] - shift);
      total += __shfl_xor_sync(0xffffffffU, total, 1);
      total += __shfl_xor_sync(0xffffffffU, total, 2);
      const int row = share.first_row + 16 * tile + 8 * half + lane / 4;
      if (lane % 4 == 0 && row < n_rows) {
        partial[(static_cast<std::int64_t>(kv_head) * n_rows + row) * n_partials +
                blockIdx.x * share.n_turns + share.turn] = make_float2(most, total);
      }
    }
  }
}

// One warp a row: {maximum, 1 / sum}.
__global__ void __launch_bounds__(kThreads)
    combine_sums(const float2* partial, int n_partials, int n_rows, float2* sums) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= n_rows) return;
  partial += static_cast<std::int64_t>(row) * n_partials;
  float most = -INFINITY;
  for (int i = threadIdx.x % 32; i < n_partials; i += 32) most = fmaxf(most, partial[i].x);
  for (int distance = 16; distance > 0; distance /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, distance));
  }
  const float shift = most == -INFINITY ? 0.0F : most;
  float sum = 0.0F;
  for (int i = threadIdx.x % 32; i < n_partials; i += 32) {
    sum += partial[i].y * exp2f(partial[i].x - shift);
  }
  sum = score::warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[row] = make_float2(shift, 1.0F / sum);
}

template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kThreads, 2)
    write_probabilities(const Layer layer, float scale_log2, const float2* sums, Rows p) {
  using Rows16 = Scorer<kHeadDim, kBf16>;
  constexpr int kTiles = Rows16::kTiles;
  __shared__ int shared[kWarps];
  const int kv_head = blockIdx.y;
  const DeviceKvHead& head = layer.head(kv_head);
  const Units units = score::units_of(head, layer.n_tokens);
  const Share share = share_of(layer, units, 16 * kTiles);
  const int n_rows = layer.group * layer.n_queries;
  const int n_block_slots = layer.n_slots[kv_head] - (layer.n_tokens - head.tail_first);
  // Slots of the blocks before this chunk.
  int slots_before = 0;
  if (share.begin < units.n_blocks) {
    for (int i = threadIdx.x; i < share.begin; i += kThreads) {
      slots_before += head.blocks[i].end - head.blocks[i].first;
    }
    slots_before = score::block_sum<kThreads>(slots_before, shared);
  }
  if (share.first_row >= n_rows) return;
  const int lane = threadIdx.x % 32;
  Rows16 rows;
  rows.load(layer, kv_head, share.first_row);

  float shift[kTiles][2];
  float factor[kTiles][2];
  int last[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = share.first_row + 16 * tile + 8 * half + lane / 4;
      const float2 of_row = row < n_rows ? sums[static_cast<std::int64_t>(kv_head) * n_rows + row]
                                         : make_float2(0.0F, 0.0F);
      shift[tile][half] = of_row.x;
      factor[tile][half] = of_row.y;
      last[tile][half] = layer.n_tokens - layer.n_queries + row % layer.n_queries;
    }
  }
  for (int index = share.begin; index < share.end; ++index) {
    const Unit unit = score::unit_at(layer, head, units, kv_head, index);
    const bool is_block = index < units.n_blocks;
    const int slot =
        is_block ? slots_before - unit.begin : n_block_slots + unit.position - head.tail_first;
    if (is_block) slots_before += unit.end - unit.begin;
    if ((index - share.begin) % share.n_turns != share.turn) continue;
    float out[kTiles][4][4];
    rows.scores(unit.page, out);
    const bool whole = unit.begin == 0 && unit.end == kUnitTokens && slot % 2 == 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = share.first_row + 16 * tile + 8 * half + lane / 4;
        if (row >= n_rows) continue;
        float* target =
            p.data + (static_cast<std::int64_t>(kv_head) * n_rows + row) * p.stride + slot;
        const int seen = last[tile][half] - unit.position + 1;
#pragma unroll
        for (int column = 0; column < 4; ++column) {
          const int token = 8 * column + 2 * (lane % 4);
          float value[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float x = out[tile][column][2 * half + c] * scale_log2 - shift[tile][half];
            value[c] = token + c < seen ? exp2f(x) * factor[tile][half] : 0.0F;
          }
          if (whole) {
            *reinterpret_cast<float2*>(target + token) = make_float2(value[0], value[1]);
          } else {
            if (token >= unit.begin && token < unit.end) target[token] = value[0];
            if (token + 1 >= unit.begin && token + 1 < unit.end) target[token + 1] = value[1];
          }
        }
      }
    }
  }
}

template <int kHeadDim, bool kBf16>
void launch_probabilities(const CudaContext& context, const Layer& layer, std::int64_t most_slots,
                          float scale, float2* partial, float2* sums, Rows p) {
  constexpr int kRowsPerWarp = 16 * Scorer<kHeadDim, kBf16>::kTiles;
  const int n_rows = layer.group * layer.n_queries;
  const int warps = row_warps(n_rows, kRowsPerWarp);
  const std::int64_t n_units = most_slots / kUnitTokens + 1;
  const auto n_chunks = static_cast<unsigned>(
      std::min<std::int64_t>((n_units + kMinUnits - 1) / kMinUnits, kMaxChunks));
  const int n_partials = static_cast<int>(n_chunks) * (kWarps / warps);
  const dim3 grid(
      n_chunks, static_cast<unsigned>(layer.n_kv_heads),
      static_cast<unsigned>((n_rows + warps * kRowsPerWarp - 1) / (warps * kRowsPerWarp)));
  const int n_all_rows = n_rows * layer.n_kv_heads;
  cudaStream_t stream = context.stream();
  window_sums<kHeadDim, kBf16>
      <<<grid, kThreads, 0, stream>>>(layer, scale * kLog2E, partial, n_partials);
  check_launch("window_sums");
  combine_sums<<<static_cast<unsigned>((n_all_rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(
      partial, n_partials, n_all_rows, sums);
  check_launch("combine_sums");
  write_probabilities<kHeadDim, kBf16>
      <<<grid, kThreads, 0, stream>>>(layer, scale * kLog2E, sums, p);
  check_launch("write_probabilities");
}

}  // namespace

std::int64_t score_stride(std::span<const std::int64_t> n_slots) {
  return (score::largest(n_slots) + 31) / 32 * 32;
}

std::size_t window_probabilities_workspace_bytes(const AttentionShape& shape, int n_queries) {
  const auto n_rows = static_cast<std::size_t>(shape.n_heads) * static_cast<std::size_t>(n_queries);
  return n_rows * (kMaxChunks * kWarps + 1) * sizeof(float2);
}

void window_probabilities(const CudaContext& context, const DeviceScoreLayer& layer, float scale,
                          std::byte* workspace, std::size_t workspace_bytes, Rows p) {
  const Layer view = score::layer_of(layer);
  CHECK(layer.n_queries > 0 && scale > 0.0F && layer.q != nullptr, "window_probabilities queries");
  CHECK(p.n_rows == std::int64_t{view.n_heads} * view.n_queries &&
            p.stride >= score_stride(layer.n_slots) && p.stride % 4 == 0,
        "window_probabilities rows");
  CHECK(workspace_bytes >= window_probabilities_workspace_bytes(layer.shape, layer.n_queries),
        "window_probabilities workspace");
  auto* sums = reinterpret_cast<float2*>(workspace);
  float2* partial = sums + p.n_rows;
  const std::int64_t most = score::largest(layer.n_slots);
  const bool bf16 = layer.pool.layout.dtype == DType::kBF16;
  if (layer.shape.head_dim == 128) {
    bf16 ? launch_probabilities<128, true>(context, view, most, scale, partial, sums, p)
         : launch_probabilities<128, false>(context, view, most, scale, partial, sums, p);
  } else {
    bf16 ? launch_probabilities<64, true>(context, view, most, scale, partial, sums, p)
         : launch_probabilities<64, false>(context, view, most, scale, partial, sums, p);
  }
}

}  // namespace spindle::kernels
