#pragma once
// Scores of an observation window's queries against a head's cached keys, one block at a time: the
// keys of its units come through a ring in shared memory (cp.async), the products are mma.

#include "kernels/core/cuda_context.h"
#include "kernels/cuda/kv_score_device.cuh"
#include "kernels/cuda/mma.cuh"

namespace spindle::kernels::score {

inline constexpr int kWindowWarps = 4;
inline constexpr int kWindowThreads = 32 * kWindowWarps;
inline constexpr int kKeyStages = 3;
inline constexpr float kLog2E = 1.4426950408889634F;

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
  __device__ void scores(const std::byte* page_keys, float (&out)[kTiles][4][4]) const {
    const int lane = threadIdx.x % 32;
    const auto* keys = reinterpret_cast<const uint4*>(page_keys) + lane / 4 * 4 + lane % 4;
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
    device::mma<kBf16>(c, rows[0], rows[1], rows[2], rows[3], b0, b1);
  }
};

// How the warps of a block share its rows and its units: n_row_warps (a power of two) take rows
// apart, the others take turns at the units of a step.
struct WindowShape {
  std::int32_t n_rows;        // of the kv head
  std::int32_t n_row_warps;   // in a block
  std::int32_t n_turns;       // units of a step
  std::int32_t n_row_groups;  // of n_row_warps warps
};

template <int kHeadDim, bool kBf16>
__host__ __device__ WindowShape window_shape(int group, int n_queries) {
  constexpr int kRows = 16 * Scorer<kHeadDim, kBf16>::kTiles;
  WindowShape shape;
  shape.n_rows = group * n_queries;
  shape.n_row_warps = 32 / kRows;  // at least 32 rows a block
  while (shape.n_row_warps < kWindowWarps && shape.n_row_warps * kRows < shape.n_rows) {
    shape.n_row_warps *= 2;
  }
  shape.n_turns = kWindowWarps / shape.n_row_warps;
  const int rows = shape.n_row_warps * kRows;
  shape.n_row_groups = (shape.n_rows + rows - 1) / rows;
  return shape;
}

// The keys of a unit: the first half of its page.
template <int kHeadDim>
inline constexpr int kKeyBytes = kHeadDim* kUnitTokens * 2;

template <int kHeadDim>
int key_ring_bytes(int n_turns) {
  return kKeyStages * n_turns * kKeyBytes<kHeadDim>;
}

// The ring over the units [begin, end) of a head, n_turns of them a step. All threads call it
// alike.
template <int kHeadDim>
class KeyRing {
 public:
  __device__ KeyRing(const Layer& layer, const DeviceKvHead& head, const Units& units, int kv_head,
                     int begin, int end, int n_turns, std::byte* shared)
      : layer_(layer),
        head_(head),
        units_(units),
        kv_head_(kv_head),
        begin_(begin),
        end_(end),
        n_turns_(n_turns),
        shared_(shared) {
    for (int step = 0; step < kKeyStages - 1; ++step) fetch(step);
  }

  __device__ int n_steps() const { return (end_ - begin_ + n_turns_ - 1) / n_turns_; }

  // Waits for a step and starts the one that takes its predecessor's place. Afterwards keys(turn)
  // are there for all threads, until the next call.
  __device__ void next(int step) {
    device::wait_copies<kKeyStages - 2>();
    __syncthreads();
    fetch(step + kKeyStages - 1);
    stage_ = shared_ + step % kKeyStages * n_turns_ * kKeyBytes<kHeadDim>;
  }
  __device__ const std::byte* keys(int turn) const { return stage_ + turn * kKeyBytes<kHeadDim>; }

 private:
  __device__ void fetch(int step) {
    for (int turn = 0; turn < n_turns_; ++turn) {
      const int index = begin_ + step * n_turns_ + turn;
      if (index >= end_) break;
      const std::byte* page = unit_at(layer_, head_, units_, kv_head_, index).page;
      const std::uint32_t target = device::shared_address(
          shared_ + (step % kKeyStages * n_turns_ + turn) * kKeyBytes<kHeadDim>);
#pragma unroll
      for (int i = 0; i < kKeyBytes<kHeadDim> / (16 * kWindowThreads); ++i) {
        const int at = (i * kWindowThreads + static_cast<int>(threadIdx.x)) * 16;
        device::copy_16(target + at, page + at);
      }
    }
    device::commit_copies();
  }

  const Layer& layer_;
  const DeviceKvHead& head_;
  const Units& units_;
  int kv_head_;
  int begin_;
  int end_;
  int n_turns_;
  std::byte* shared_;
  const std::byte* stage_ = nullptr;
};

// Slots before the unit `index`, counted by all threads of the block. `shared` holds a value a
// warp.
__device__ inline int slots_before(const DeviceKvHead& head, const Units& units, int n_block_slots,
                                   int index, int* shared) {
  if (index >= units.n_blocks) {
    const int page = units.first_tail_page + index - units.n_blocks;
    return n_block_slots + max(head.tail_origin + page * kUnitTokens - head.tail_first, 0);
  }
  int count = 0;
  for (int i = threadIdx.x; i < index; i += kWindowThreads) {
    count += head.blocks[i].end - head.blocks[i].first;
  }
  return block_sum<kWindowThreads>(count, shared);
}

// ---- Row sums, in kernels of kv_score_cuda.cu.

// {maximum of scores times scale log2 e, 1 / sum, factor, mass in the window} of every row: the
// probability of score x is exp2(x - maximum) / sum, and `factor` turns the sum of five
// probabilities into a pooled value of the row's mass before the window (defensive scores).
struct RowTotals {
  float maximum;
  float inverse_sum;
  float pooling_factor;
  float window_mass;
};

// Into totals [kv heads][rows].
void launch_row_totals(const CudaContext& context, const Layer& layer, int head_dim, bool bf16,
                       std::int64_t most_slots, float scale, std::byte* workspace,
                       RowTotals* totals);
std::size_t row_totals_workspace_bytes(const AttentionShape& shape, int n_queries);

// Blocks along the units of a head: at least min_units each, and in all no more than one wave of
// three a multiprocessor.
inline unsigned window_chunks(const CudaContext& context, std::int64_t most_slots, int min_units,
                              int blocks_per_chunk, int max_chunks) {
  const std::int64_t n_units = most_slots / kUnitTokens + 1;
  const std::int64_t chunks = (n_units + min_units - 1) / min_units;
  std::int64_t limit = 3 * context.n_multiprocessors() / blocks_per_chunk;
  limit = limit < 1 ? 1 : limit > max_chunks ? max_chunks : limit;
  return static_cast<unsigned>(chunks < limit ? chunks : limit);
}

}  // namespace spindle::kernels::score
