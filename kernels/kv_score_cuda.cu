// Rows of the observation window: their maxima and sums, and probabilities. A window's scores (some
// hundred rows against n tokens) are bound by what is written, so the keys are read twice and
// logits are never stored.
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/window_scorer.cuh"

namespace spindle::kernels {
namespace score {
namespace {

constexpr int kMaxChunks = 64;
constexpr int kMinUnits = 2;
constexpr int kEdges = 4;
constexpr int kRowThreads = 128;

// Of a row's part.
struct Partial {
  float maximum;
  float before_window;  // sums of exp2(x - maximum)
  float in_window;
};

// The first two and the last two slots before the window: pooling loses some of their mass.
struct Place {
  std::int32_t unit;  // -1: there is no such slot
  std::int32_t token;
};

// Edge 0 and 1: from the front; 2 and 3: the last but one, the last.
__device__ Place edge_place(const Layer& layer, const DeviceKvHead& head, const Units& units,
                            int kv_head, int edge) {
  const int n = layer.n_slots[kv_head] - layer.n_queries;
  if (n == 0 || (n == 1 && (edge == 1 || edge == 2))) return {-1, 0};
  if (edge < 2) {
    int left = edge;
    for (int index = 0;; ++index) {
      const Unit unit = unit_at(layer, head, units, kv_head, index);
      if (left < unit.end - unit.begin) return {index, unit.begin + left};
      left -= unit.end - unit.begin;
    }
  }
  const int position = layer.n_tokens - layer.n_queries - 1 - (3 - edge);
  if (position >= head.tail_first) {
    const int at = position - head.tail_origin;
    return {units.n_blocks + at / kUnitTokens - units.first_tail_page, at % kUnitTokens};
  }
  int left = head.tail_first - 1 - position;  // tokens behind it in the blocks
  for (int index = units.n_blocks - 1;; --index) {
    const DeviceKvBlock& block = head.blocks[index];
    if (left < block.end - block.first) return {index, block.end - 1 - left};
    left -= block.end - block.first;
  }
}

__host__ __device__ inline int rows_per_warp(int tiles) { return 16 * tiles; }

// Units of this block.
struct Range {
  std::int32_t begin;
  std::int32_t end;
};
__device__ inline Range chunk_of(const Units& units) {
  const int per_chunk = (units.n_units + gridDim.x - 1) / gridDim.x;
  const int begin = min(static_cast<int>(blockIdx.x) * per_chunk, units.n_units);
  return {begin, min(begin + per_chunk, units.n_units)};
}

// Grid: chunks, kv heads, groups of rows. partial [rows][chunks * turns], edges [rows][kEdges].
template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kWindowThreads, 3)
    sum_rows(const Layer layer, float scale_log2, Partial* partial, float* edges) {
  using WindowRows = Scorer<kHeadDim, kBf16>;
  constexpr int kTiles = WindowRows::kTiles;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ Place edge_places[kEdges];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int kv_head = blockIdx.y;
  const DeviceKvHead& head = layer.head(kv_head);
  const Units units = units_of(head, layer.n_tokens);
  const WindowShape shape = window_shape<kHeadDim, kBf16>(layer.group, layer.n_queries);
  const Range range = chunk_of(units);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int turn = warp / shape.n_row_warps;
  const int first_row =
      (static_cast<int>(blockIdx.z) * shape.n_row_warps + warp % shape.n_row_warps) *
      rows_per_warp(kTiles);
  const std::int64_t first_of_head = static_cast<std::int64_t>(kv_head) * shape.n_rows;
  KeyRing<kHeadDim> ring(layer, head, units, kv_head, range.begin, range.end, shape.n_turns,
                         shared);
  if (threadIdx.x < kEdges) {
    edge_places[threadIdx.x] = edge_place(layer, head, units, kv_head, threadIdx.x);
  }
  WindowRows rows;
  rows.load(layer, kv_head, first_row);

  float best[kTiles][2];
  float sum[kTiles][2];
  float window_sum[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best[tile][half] = -INFINITY;
      sum[tile][half] = 0.0F;
      window_sum[tile][half] = 0.0F;
    }
  }
  const int window_begin = layer.n_tokens - layer.n_queries;
  const int n_steps = ring.n_steps();
  for (int step = 0; step < n_steps; ++step) {
    ring.next(step);
    const int index = range.begin + step * shape.n_turns + turn;
    if (index >= range.end) continue;
    const Unit unit = unit_at(layer, head, units, kv_head, index);
    float out[kTiles][4][4];
    rows.scores(ring.keys(turn), out);
    const bool reaches_window = unit.position + unit.end > window_begin;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int end = unit.end;
        if (reaches_window) {
          const int row = first_row + 16 * tile + 8 * half + lane / 4;
          end = min(end, window_begin + row % layer.n_queries - unit.position + 1);
        }
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
        const float rescale = exp2f(best[tile][half] - shift);
        float added = 0.0F;
        float added_window = 0.0F;
#pragma unroll
        for (int column = 0; column < 4; ++column) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float value = exp2f(out[tile][column][2 * half + c] - shift);
            const int token = 8 * column + 2 * (lane % 4) + c;
            if (reaches_window && unit.position + token >= window_begin) {
              added_window += value;
            } else {
              added += value;
            }
          }
        }
        sum[tile][half] = sum[tile][half] * rescale + added;
        window_sum[tile][half] = window_sum[tile][half] * rescale + added_window;
        best[tile][half] = most;
      }
    }
#pragma unroll
    for (int edge = 0; edge < kEdges; ++edge) {
      if (edge_places[edge].unit != index) continue;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int at = 0; at < 16; ++at) {
          const int row = first_row + 16 * tile + 8 * (at / 2 % 2) + lane / 4;
          const int token = 8 * (at / 4) + 2 * (lane % 4) + at % 2;
          if (token == edge_places[edge].token && row < shape.n_rows) {
            edges[(first_of_head + row) * kEdges + edge] = out[tile][at / 4][at % 4];
          }
        }
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
      const float rescale = exp2f(best[tile][half] - (most == -INFINITY ? 0.0F : most));
      float before = sum[tile][half] * rescale;
      float in_window = window_sum[tile][half] * rescale;
      for (int distance = 1; distance < 4; distance *= 2) {
        before += __shfl_xor_sync(0xffffffffU, before, distance);
        in_window += __shfl_xor_sync(0xffffffffU, in_window, distance);
      }
      const int row = first_row + 16 * tile + 8 * half + lane / 4;
      if (lane % 4 == 0 && row < shape.n_rows) {
        partial[(first_of_head + row) * gridDim.x * shape.n_turns + blockIdx.x * shape.n_turns +
                turn] = {most, before, in_window};
      }
    }
  }
}

// One warp a row.
__global__ void __launch_bounds__(kRowThreads)
    finish_rows(const Layer layer, const Partial* partial, const float* edges, int n_partials,
                RowTotals* totals) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32;
  if (row >= layer.n_heads * layer.n_queries) return;
  partial += static_cast<std::int64_t>(row) * n_partials;
  float most = -INFINITY;
  for (int i = threadIdx.x % 32; i < n_partials; i += 32) most = fmaxf(most, partial[i].maximum);
  for (int distance = 16; distance > 0; distance /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, distance));
  }
  const float shift = most == -INFINITY ? 0.0F : most;
  double before = 0.0;
  double in_window = 0.0;
  for (int i = threadIdx.x % 32; i < n_partials; i += 32) {
    const auto rescale = static_cast<double>(exp2f(partial[i].maximum - shift));
    before += static_cast<double>(partial[i].before_window) * rescale;
    in_window += static_cast<double>(partial[i].in_window) * rescale;
  }
  before = warp_sum(before);
  in_window = warp_sum(in_window);
  if (threadIdx.x % 32 != 0) return;
  // Each value counts in five pooling windows, less those that would be centred outside.
  const int n = layer.n_slots[row / (layer.group * layer.n_queries)] - layer.n_queries;
  const float* edge = edges + static_cast<std::int64_t>(row) * kEdges;
  double lost = 0.0;
  if (n > 0) lost += 2.0 * (exp2f(edge[0] - shift) + exp2f(edge[3] - shift));
  if (n > 1) lost += exp2f(edge[1] - shift) + exp2f(edge[2] - shift);
  const double pooled = before - lost / 5.0;
  const double sum = before + in_window;
  totals[row] = {shift, static_cast<float>(1.0 / sum),
                 pooled > 0.0 ? static_cast<float>(before / (5.0 * pooled)) : 0.0F,
                 static_cast<float>(in_window / sum)};
}

template <int kHeadDim, bool kBf16>
void row_totals(const CudaContext& context, const Layer& layer, std::int64_t most_slots,
                float scale, std::byte* workspace, RowTotals* totals) {
  const WindowShape shape = window_shape<kHeadDim, kBf16>(layer.group, layer.n_queries);
  const unsigned n_chunks = window_chunks(context, most_slots, kMinUnits * shape.n_turns,
                                          layer.n_kv_heads * shape.n_row_groups, kMaxChunks);
  const int n_rows = layer.n_heads * layer.n_queries;
  auto* edges = reinterpret_cast<float*>(workspace);
  auto* partial = reinterpret_cast<Partial*>(edges + static_cast<std::int64_t>(n_rows) * kEdges);
  const int ring = key_ring_bytes<kHeadDim>(shape.n_turns);
  cuda_check(cudaFuncSetAttribute(sum_rows<kHeadDim, kBf16>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, ring));
  const dim3 grid(n_chunks, static_cast<unsigned>(layer.n_kv_heads),
                  static_cast<unsigned>(shape.n_row_groups));
  launch_chained(context, "sum_rows", sum_rows<kHeadDim, kBf16>, grid, kWindowThreads,
                 static_cast<std::size_t>(ring), layer, scale * kLog2E, partial, edges);
  constexpr int kWarps = kRowThreads / 32;
  launch_chained(context, "finish_rows", finish_rows,
                 static_cast<unsigned>((n_rows + kWarps - 1) / kWarps), kRowThreads, 0, layer,
                 partial, edges, static_cast<int>(n_chunks) * shape.n_turns, totals);
}

template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kWindowThreads, 3)
    write_probabilities(const Layer layer, float scale_log2, const RowTotals* totals, Rows p) {
  using WindowRows = Scorer<kHeadDim, kBf16>;
  constexpr int kTiles = WindowRows::kTiles;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ int counts[kWindowWarps];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int kv_head = blockIdx.y;
  const DeviceKvHead& head = layer.head(kv_head);
  const Units units = units_of(head, layer.n_tokens);
  const WindowShape shape = window_shape<kHeadDim, kBf16>(layer.group, layer.n_queries);
  const Range range = chunk_of(units);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int turn = warp / shape.n_row_warps;
  const int first_row =
      (static_cast<int>(blockIdx.z) * shape.n_row_warps + warp % shape.n_row_warps) *
      rows_per_warp(kTiles);
  const std::int64_t first_of_head = static_cast<std::int64_t>(kv_head) * shape.n_rows;
  KeyRing<kHeadDim> ring(layer, head, units, kv_head, range.begin, range.end, shape.n_turns,
                         shared);
  const int n_block_slots = layer.n_slots[kv_head] - (layer.n_tokens - head.tail_first);
  int slot = slots_before(head, units, n_block_slots, range.begin, counts);
  WindowRows rows;
  rows.load(layer, kv_head, first_row);

  float shift[kTiles][2];
  float factor[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * tile + 8 * half + lane / 4;
      shift[tile][half] = row < shape.n_rows ? totals[first_of_head + row].maximum : 0.0F;
      factor[tile][half] = row < shape.n_rows ? totals[first_of_head + row].inverse_sum : 0.0F;
    }
  }
  const int window_begin = layer.n_tokens - layer.n_queries;
  const int n_steps = ring.n_steps();
  for (int step = 0; step < n_steps; ++step) {
    ring.next(step);
    int own_slot = 0;
    Unit unit{};
    const int first = range.begin + step * shape.n_turns;
    for (int i = 0; i < shape.n_turns && first + i < range.end; ++i) {
      const Unit other = unit_at(layer, head, units, kv_head, first + i);
      if (i == turn) {
        unit = other;
        own_slot = slot - other.begin;
      }
      slot += other.end - other.begin;
    }
    if (first + turn >= range.end) continue;
    float out[kTiles][4][4];
    rows.scores(ring.keys(turn), out);
    const bool whole = unit.begin == 0 && unit.end == kUnitTokens && own_slot % 2 == 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + 16 * tile + 8 * half + lane / 4;
        if (row >= shape.n_rows) continue;
        float* target = p.data + (first_of_head + row) * p.stride + own_slot;
        const int seen = window_begin + row % layer.n_queries - unit.position + 1;
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
void probabilities(const CudaContext& context, const Layer& layer, std::int64_t most_slots,
                   float scale, const RowTotals* totals, Rows p) {
  const WindowShape shape = window_shape<kHeadDim, kBf16>(layer.group, layer.n_queries);
  const int ring = key_ring_bytes<kHeadDim>(shape.n_turns);
  cuda_check(cudaFuncSetAttribute(write_probabilities<kHeadDim, kBf16>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, ring));
  const dim3 grid(window_chunks(context, most_slots, kMinUnits * shape.n_turns,
                                layer.n_kv_heads * shape.n_row_groups, kMaxChunks),
                  static_cast<unsigned>(layer.n_kv_heads),
                  static_cast<unsigned>(shape.n_row_groups));
  launch_chained(context, "write_probabilities", write_probabilities<kHeadDim, kBf16>, grid,
                 kWindowThreads, static_cast<std::size_t>(ring), layer, scale * kLog2E, totals, p);
}

}  // namespace

std::size_t row_totals_workspace_bytes(const AttentionShape& shape, int n_queries) {
  const auto n_rows = static_cast<std::size_t>(shape.n_heads) * static_cast<std::size_t>(n_queries);
  return n_rows * (kEdges * sizeof(float) + kMaxChunks * kWindowWarps * sizeof(Partial));
}

void launch_row_totals(const CudaContext& context, const Layer& layer, int head_dim, bool bf16,
                       std::int64_t most_slots, float scale, std::byte* workspace,
                       RowTotals* totals) {
  if (head_dim == 128) {
    bf16 ? row_totals<128, true>(context, layer, most_slots, scale, workspace, totals)
         : row_totals<128, false>(context, layer, most_slots, scale, workspace, totals);
  } else {
    bf16 ? row_totals<64, true>(context, layer, most_slots, scale, workspace, totals)
         : row_totals<64, false>(context, layer, most_slots, scale, workspace, totals);
  }
}

}  // namespace score

std::int64_t score_stride(std::span<const std::int64_t> n_slots) {
  return (score::largest(n_slots) + 31) / 32 * 32;
}

std::size_t window_probabilities_workspace_bytes(const AttentionShape& shape, int n_queries) {
  return static_cast<std::size_t>(shape.n_heads) * static_cast<std::size_t>(n_queries) *
             sizeof(score::RowTotals) +
         score::row_totals_workspace_bytes(shape, n_queries);
}

void window_probabilities(const CudaContext& context, const DeviceScoreLayer& layer, float scale,
                          std::byte* workspace, std::size_t workspace_bytes, Rows p) {
  const score::Layer view = score::layer_of(layer);
  CHECK(layer.n_queries > 0 && scale > 0.0F && layer.q != nullptr, "window_probabilities queries");
  CHECK(p.n_rows == std::int64_t{view.n_heads} * view.n_queries &&
            p.stride >= score_stride(layer.n_slots) && p.stride % 4 == 0,
        "window_probabilities rows");
  CHECK(workspace_bytes >= window_probabilities_workspace_bytes(layer.shape, layer.n_queries),
        "window_probabilities workspace");
  auto* totals = reinterpret_cast<score::RowTotals*>(workspace);
  const std::int64_t most = score::largest(layer.n_slots);
  const bool bf16 = layer.pool.layout.dtype == DType::kBF16;
  score::launch_row_totals(context, view, layer.shape.head_dim, bf16, most, scale,
                           reinterpret_cast<std::byte*>(totals + p.n_rows), totals);
  if (layer.shape.head_dim == 128) {
    bf16 ? score::probabilities<128, true>(context, view, most, scale, totals, p)
         : score::probabilities<128, false>(context, view, most, scale, totals, p);
  } else {
    bf16 ? score::probabilities<64, true>(context, view, most, scale, totals, p)
         : score::probabilities<64, false>(context, view, most, scale, totals, p);
  }
}

}  // namespace spindle::kernels
