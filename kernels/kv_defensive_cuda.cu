// DefensiveKV's scores (kv_score.h): totals of the window's rows, then one more pass over the keys
// that pools each row's probabilities and keeps column maxima and means, then floor and norm.
#include <algorithm>

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/block_rank.cuh"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/window_scorer.cuh"

namespace spindle::kernels {
namespace {

using score::KeyRing;
using score::kUnitTokens;
using score::kWindowThreads;
using score::Layer;
using score::RowTotals;
using score::Scorer;
using score::Unit;
using score::Units;
using score::WindowShape;

// Columns that a block takes, in units; about one more on both sides is computed twice.
constexpr int kMinUnits = 2;
constexpr int kMaxUnits = 64;
constexpr int kFinishThreads = 256;

// ---- Column maxima and means.

// Reduces kColumns values over 32 lanes: halves of the columns go to halves of the lanes. Lane i
// ends with column i * kColumns / 32 in v[0].
template <int kColumns, int kDistance, int kSize, typename Op>
__device__ void reduce_columns(float (&v)[kSize], Op op) {
  const bool upper = (threadIdx.x & kDistance) != 0;
  if constexpr (kColumns >= 2) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const float low = v[i];
      const float high = v[i + kColumns / 2];
      const float received = __shfl_xor_sync(0xffffffffU, upper ? low : high, kDistance);
      v[i] = op(upper ? high : low, received);
    }
  } else {
    v[0] = op(v[0], __shfl_xor_sync(0xffffffffU, v[0], kDistance));
  }
  if constexpr (kDistance > 1) {
    reduce_columns<(kColumns >= 2 ? kColumns / 2 : 1), kDistance / 2>(v, op);
  }
}

struct Located {
  std::int32_t unit;
  std::int32_t slot;  // of the unit's first visible token
};

// The unit of a slot; all threads of the block call it.
__device__ Located locate(const Layer& layer, const DeviceKvHead& head, const Units& units,
                          int kv_head, int slot) {
  __shared__ int counts[kWindowThreads / 32];
  __shared__ Located located;
  const int n_block_slots = layer.n_slots[kv_head] - (layer.n_tokens - head.tail_first);
  if (slot >= n_block_slots) {
    const int at = head.tail_first + (slot - n_block_slots) - head.tail_origin;
    const int page = at / kUnitTokens;
    const int first = head.tail_origin + page * kUnitTokens - head.tail_first;
    return {units.n_blocks + page - units.first_tail_page, n_block_slots + max(first, 0)};
  }
  // Each thread has blocks that lie together.
  const int per_thread = (units.n_blocks + kWindowThreads - 1) / kWindowThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, units.n_blocks);
  const int end = min(begin + per_thread, units.n_blocks);
  int own = 0;
  for (int i = begin; i < end; ++i) own += head.blocks[i].end - head.blocks[i].first;
  int before = rank::warp_prefix(own);
  __syncthreads();
  if (threadIdx.x % 32 == 31) counts[threadIdx.x / 32] = before;
  __syncthreads();
  before -= own;
  for (int warp = 0; warp < static_cast<int>(threadIdx.x) / 32; ++warp) before += counts[warp];
  if (slot >= before && slot < before + own) {
    int index = begin;
    for (;; ++index) {
      const int count = head.blocks[index].end - head.blocks[index].first;
      if (slot < before + count) break;
      before += count;
    }
    located = {index, before};
  }
  __syncthreads();
  return located;
}

// A block's shared memory behind the ring of keys.
template <int kHeadDim, bool kBf16>
struct MaximaShared {
  static constexpr int kLaneColumns = 16 * Scorer<kHeadDim, kBf16>::kTiles;  // of a thread
  int n_rows;                                                                // of a row group
  int row_stride;  // of p: four columns of the step before, a step's; odd
  int step_columns;
  float* p;         // [n_rows][row_stride]
  float* factors;   // [n_rows]
  float* best;      // [n_rows / 32][step_columns]
  float* sum;       // the same
  float* all_best;  // [columns of the block]
  float* all_sum;

  __host__ __device__ explicit MaximaShared(const WindowShape& shape)
      : n_rows(shape.n_row_warps * kLaneColumns),
        row_stride(kUnitTokens * shape.n_turns + 5),
        step_columns(kUnitTokens * shape.n_turns) {}
  __host__ __device__ int n_bytes(int n_columns) const {
    return 4 * (n_rows * (row_stride + 1) + 2 * (n_rows / 32 * step_columns) + 2 * n_columns);
  }
  __device__ void place(std::byte* base, int n_columns) {
    p = reinterpret_cast<float*>(base);
    factors = p + n_rows * row_stride;
    best = factors + n_rows;
    sum = best + n_rows / 32 * step_columns;
    all_best = sum + n_rows / 32 * step_columns;
    all_sum = all_best + n_columns;
  }
};

// Grid: columns, kv heads. Writes the maxima over rows of pooled probabilities to out.scores, the
// means over rows to out.means and the maxima's sums to floor_parts [kv heads][blocks].
template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kWindowThreads, 3)
    window_maxima(const Layer layer, float scale_log2, const RowTotals* totals, int n_columns,
                  DeviceDefensive out, double* floor_parts) {
  using WindowRows = Scorer<kHeadDim, kBf16>;
  using Shared = MaximaShared<kHeadDim, kBf16>;
  constexpr int kTiles = WindowRows::kTiles;
  constexpr int kLaneColumns = Shared::kLaneColumns;
  extern __shared__ __align__(128) std::byte dynamic[];
  __shared__ double sums[kWindowThreads / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int kv_head = blockIdx.y;
  const DeviceKvHead& head = layer.head(kv_head);
  const Units units = score::units_of(head, layer.n_tokens);
  const WindowShape shape = score::window_shape<kHeadDim, kBf16>(layer.group, layer.n_queries);
  const int n = layer.n_slots[kv_head] - layer.n_queries;
  const int first_column = static_cast<int>(blockIdx.x) * n_columns;
  const int end_column = min(first_column + n_columns, n);
  totals += static_cast<std::int64_t>(kv_head) * shape.n_rows;
  if (blockIdx.x == 0) {
    for (int row = threadIdx.x; row < shape.n_rows; row += kWindowThreads) {
      out.window_mass[static_cast<std::int64_t>(kv_head) * shape.n_rows + row] =
          totals[row].window_mass;
    }
    if (kv_head == 0 && threadIdx.x == 0) *out.best = 0.0F;
  }
  double* floor_part = floor_parts + static_cast<std::int64_t>(kv_head) * gridDim.x + blockIdx.x;
  if (first_column >= n) {
    if (threadIdx.x == 0) *floor_part = 0.0;
    return;
  }
  const int ring_bytes = score::kKeyStages * shape.n_turns * score::kKeyBytes<kHeadDim>;
  Shared shared(shape);
  shared.place(dynamic + ring_bytes, n_columns);
  for (int i = threadIdx.x; i < n_columns; i += kWindowThreads) {
    shared.all_best[i] = 0.0F;
    shared.all_sum[i] = 0.0F;
  }
  // Pooled columns need two more on both sides.
  const Located from = locate(layer, head, units, kv_head, max(first_column - 2, 0));
  const int end_unit = locate(layer, head, units, kv_head, min(end_column + 2, n) - 1).unit + 1;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int turn = warp / shape.n_row_warps;
  const int own_row = threadIdx.x % shared.n_rows;
  const int own_first = static_cast<int>(threadIdx.x) / shared.n_rows * kLaneColumns;
  for (int group = 0; group < shape.n_row_groups; ++group) {
    const int group_row = group * shared.n_rows;
    const int warp_row = warp % shape.n_row_warps * 16 * kTiles;
    WindowRows rows;
    rows.load(layer, kv_head, group_row + warp_row);
    float shift[kTiles][2];
    float inverse[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = group_row + warp_row + 16 * tile + 8 * half + lane / 4;
        shift[tile][half] = row < shape.n_rows ? totals[row].maximum : 0.0F;
        inverse[tile][half] = row < shape.n_rows ? totals[row].inverse_sum : 0.0F;
      }
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < shared.n_rows) {
      const int row = group_row + static_cast<int>(threadIdx.x);
      shared.factors[threadIdx.x] = row < shape.n_rows ? totals[row].pooling_factor : 0.0F;
      // Nothing is before the first column; elsewhere these columns are not this block's.
      for (int i = 0; i < 4; ++i) shared.p[threadIdx.x * shared.row_stride + i] = 0.0F;
    }
    KeyRing<kHeadDim> ring(layer, head, units, kv_head, from.unit, end_unit, shape.n_turns,
                           dynamic);
    int slot = from.slot;  // of the step's first column

    // The columns two before the last `count` ones: pooled, reduced over rows, added to the
    // block's.
    const auto take = [&](int count) {
      const float* x = shared.p + own_row * shared.row_stride + own_first;
      float* partial_best = shared.best + own_row / 32 * shared.step_columns + own_first;
      float* partial_sum = shared.sum + own_row / 32 * shared.step_columns + own_first;
      const int column = lane * kLaneColumns / 32;
      {
        const float factor = shared.factors[own_row];
        float v[kLaneColumns];
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          v[i] = (((x[i] + x[i + 1]) + x[i + 2]) + (x[i + 3] + x[i + 4])) * factor;
        }
        // Leaves NaN out.
        reduce_columns<kLaneColumns, 16>(v, [](float a, float b) { return fmaxf(a, b); });
        partial_best[column] = fmaxf(v[0], 0.0F);
      }
      {
        float v[kLaneColumns];
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) v[i] = x[i + 2];
        reduce_columns<kLaneColumns, 16>(v, [](float a, float b) { return a + b; });
        partial_sum[column] = v[0];
      }
      float kept[4];
      const bool has_row = static_cast<int>(threadIdx.x) < shared.n_rows;
      float* row = shared.p + threadIdx.x * shared.row_stride;
      if (has_row) {
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[i] = row[count + i];
      }
      __syncthreads();
      if (has_row) {
#pragma unroll
        for (int i = 0; i < 4; ++i) row[i] = kept[i];
      }
      const int target = slot - 2 + static_cast<int>(threadIdx.x) - first_column;
      if (static_cast<int>(threadIdx.x) < count && target >= 0 &&
          target < end_column - first_column) {
        float best = shared.all_best[target];
        float sum = shared.all_sum[target];
        for (int i = 0; i < shared.n_rows / 32; ++i) {
          best = fmaxf(best, shared.best[i * shared.step_columns + threadIdx.x]);
          sum += shared.sum[i * shared.step_columns + threadIdx.x];
        }
        shared.all_best[target] = best;
        shared.all_sum[target] = sum;
      }
      slot += count;
    };

    const int n_steps = ring.n_steps();
    for (int step = 0; step < n_steps; ++step) {
      ring.next(step);
      Unit unit{};
      int own_column = 0;  // of the unit's token 0
      int count = 0;
      const int first = from.unit + step * shape.n_turns;
      for (int i = 0; i < shape.n_turns && first + i < end_unit; ++i) {
        const Unit other = score::unit_at(layer, head, units, kv_head, first + i);
        if (i == turn) {
          unit = other;
          own_column = 4 + count - other.begin;
        }
        count += other.end - other.begin;
      }
      count = min(count, n - slot);
      if (first + turn < end_unit) {
        float x[kTiles][4][4];
        rows.scores(ring.keys(turn), x);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float* target = shared.p +
                            (warp_row + 16 * tile + 8 * half + lane / 4) * shared.row_stride +
                            own_column;
#pragma unroll
            for (int at = 0; at < 8; ++at) {
              const int token = 8 * (at / 2) + 2 * (lane % 4) + at % 2;
              if (token >= unit.begin && token < unit.end && own_column + token < 4 + count) {
                target[token] =
                    exp2f(x[tile][at / 2][2 * half + at % 2] * scale_log2 - shift[tile][half]) *
                    inverse[tile][half];
              }
            }
          }
        }
      }
      __syncthreads();
      take(count);
    }
    if (slot == n) {
      // Behind the last column there is nothing.
      if (static_cast<int>(threadIdx.x) < shared.n_rows) {
        shared.p[threadIdx.x * shared.row_stride + 4] = 0.0F;
        shared.p[threadIdx.x * shared.row_stride + 5] = 0.0F;
      }
      __syncthreads();
      take(2);
    }
  }
  __syncthreads();
  double maxima = 0.0;
  for (int i = threadIdx.x; i < end_column - first_column; i += kWindowThreads) {
    const std::int64_t column = first_column + i;
    out.scores.data[kv_head * out.scores.stride + column] = shared.all_best[i];
    out.means.data[kv_head * out.means.stride + column] =
        shared.all_sum[i] / static_cast<float>(shape.n_rows);
    maxima += static_cast<double>(shared.all_best[i]);
  }
  maxima = score::block_sum<kWindowThreads>(maxima, sums);
  if (threadIdx.x == 0) *floor_part = maxima;
}

// Not below the head's mean of maxima, times the norm; and the layer's highest score.
__global__ void __launch_bounds__(kFinishThreads)
    apply_floor_and_norms(const Layer layer, const double* floor_parts, int n_parts,
                          ConstRows norms, int first_norm, DeviceDefensive out) {
  __shared__ double shared[kFinishThreads / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int kv_head = blockIdx.y;
  const int n = layer.n_slots[kv_head] - layer.n_queries;
  double sum = 0.0;
  for (int i = threadIdx.x; i < n_parts; i += kFinishThreads) {
    sum += floor_parts[static_cast<std::int64_t>(kv_head) * n_parts + i];
  }
  const auto floor =
      static_cast<float>(score::block_sum<kFinishThreads>(sum, shared) / static_cast<double>(n));
  const int without_norm = layer.n_slots[kv_head] - (layer.n_tokens - first_norm);
  float best = 0.0F;
  const int t = blockIdx.x * kFinishThreads + threadIdx.x;
  if (t < n) {
    const float norm =
        t >= without_norm ? norms.data[kv_head * norms.stride + t - without_norm] : 0.0F;
    float& score = out.scores.data[kv_head * out.scores.stride + t];
    score = (score < floor ? floor : score) * norm;
    best = fmaxf(score, 0.0F);  // leaves NaN out
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    best = fmaxf(best, __shfl_xor_sync(0xffffffffU, best, distance));
  }
  // Scores are not negative, so their bits are in their order.
  if (threadIdx.x % 32 == 0 && best > 0.0F) {
    atomicMax(reinterpret_cast<int*>(out.best), __float_as_int(best));
  }
}

// Blocks of one head, at most: bounds the workspace.
constexpr int kMaxBlocks = 1024;

template <int kHeadDim, bool kBf16>
void launch_maxima(const CudaContext& context, const Layer& layer, std::int64_t most_slots,
                   float scale, const RowTotals* totals, double* floor_parts, unsigned* n_blocks,
                   const DeviceDefensive& out) {
  const WindowShape shape = score::window_shape<kHeadDim, kBf16>(layer.group, layer.n_queries);
  // One wave of three blocks a multiprocessor.
  const std::int64_t n_units = most_slots / kUnitTokens + 1;
  const std::int64_t n_wanted = 3 * context.n_multiprocessors();
  const std::int64_t per_block = (n_units * layer.n_kv_heads + n_wanted - 1) / n_wanted;
  const auto n_columns =
      static_cast<int>(kUnitTokens * std::clamp<std::int64_t>(per_block, kMinUnits, kMaxUnits));
  *n_blocks = static_cast<unsigned>((most_slots + n_columns - 1) / n_columns);
  CHECK(*n_blocks <= kMaxBlocks, "columns of defensive_scores");
  const int n_bytes = score::key_ring_bytes<kHeadDim>(shape.n_turns) +
                      MaximaShared<kHeadDim, kBf16>(shape).n_bytes(n_columns);
  cuda_check(cudaFuncSetAttribute(window_maxima<kHeadDim, kBf16>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes));
  launch_chained(context, "window_maxima", window_maxima<kHeadDim, kBf16>,
                 dim3(*n_blocks, static_cast<unsigned>(layer.n_kv_heads)), kWindowThreads,
                 static_cast<std::size_t>(n_bytes), layer, scale * score::kLog2E, totals, n_columns,
                 out, floor_parts);
}

std::size_t totals_bytes(const AttentionShape& shape, int n_queries) {
  return static_cast<std::size_t>(shape.n_heads) * static_cast<std::size_t>(n_queries) *
         sizeof(RowTotals);
}

std::size_t floor_bytes(const AttentionShape& shape) {
  return static_cast<std::size_t>(shape.n_kv_heads) * kMaxBlocks * sizeof(double);
}

}  // namespace

std::size_t defensive_workspace_bytes(const AttentionShape& shape, int n_queries) {
  return totals_bytes(shape, n_queries) + floor_bytes(shape) +
         score::row_totals_workspace_bytes(shape, n_queries);
}

void defensive_scores(const CudaContext& context, const DeviceScoreLayer& given, float scale,
                      ConstRows norms, std::int64_t first_norm, std::byte* workspace,
                      std::size_t workspace_bytes, const DeviceDefensive& out) {
  const Layer layer = score::layer_of(given);
  const std::int64_t stride = score_stride(given.n_slots);
  CHECK(layer.n_queries > 0 && scale > 0.0F && layer.q != nullptr, "defensive_scores queries");
  CHECK(out.scores.n_rows == layer.n_kv_heads && out.scores.stride >= stride &&
            out.means.n_rows == layer.n_kv_heads && out.means.stride >= stride &&
            norms.n_rows == layer.n_kv_heads && norms.stride >= given.n_tokens - first_norm,
        "defensive_scores rows");
  CHECK(first_norm >= 0 && first_norm <= given.n_tokens &&
            workspace_bytes >= defensive_workspace_bytes(given.shape, given.n_queries),
        "defensive_scores workspace");
  auto* floor_parts = reinterpret_cast<double*>(workspace);
  auto* totals = reinterpret_cast<RowTotals*>(workspace + floor_bytes(given.shape));
  std::byte* rest =
      workspace + floor_bytes(given.shape) + totals_bytes(given.shape, given.n_queries);
  const std::int64_t most = score::largest(given.n_slots);
  const bool bf16 = given.pool.layout.dtype == DType::kBF16;
  score::launch_row_totals(context, layer, given.shape.head_dim, bf16, most, scale, rest, totals);
  unsigned n_blocks = 0;
  if (given.shape.head_dim == 128) {
    bf16
        ? launch_maxima<128, true>(context, layer, most, scale, totals, floor_parts, &n_blocks, out)
        : launch_maxima<128, false>(context, layer, most, scale, totals, floor_parts, &n_blocks,
                                    out);
  } else {
    bf16 ? launch_maxima<64, true>(context, layer, most, scale, totals, floor_parts, &n_blocks, out)
         : launch_maxima<64, false>(context, layer, most, scale, totals, floor_parts, &n_blocks,
                                    out);
  }
  const dim3 grid(static_cast<unsigned>((stride + kFinishThreads - 1) / kFinishThreads),
                  static_cast<unsigned>(layer.n_kv_heads));
  launch_chained(context, "apply_floor_and_norms", apply_floor_and_norms, grid, kFinishThreads, 0,
                 layer, floor_parts, static_cast<int>(n_blocks), norms,
                 static_cast<int>(first_norm), out);
}

}  // namespace spindle::kernels
