// Products with up to 64 rows of x (tokens), bound by reading the weights.
//
// A block takes 128 rows of W at a time, 16 per warp, so that x is read once for 128 rows. The work
// is the list of (tile of 128 rows, 64 columns), tile by tile; every block has an equal piece of
// it, which may begin and end within tiles. Partial sums of a tile go to memory, and the block that
// comes last adds them up in the order of the columns: the result does not depend on which it was.
// Copies run some steps ahead in a ring: weights of each lane by itself, x by all threads together;
// one barrier a step. The first weights are asked for before the previous kernel has ended.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/skinny_mma.cuh"

namespace spindle::kernels {
namespace {

constexpr int kWarps = kSkinnyWarps;
constexpr int kThreads = kSkinnyThreads;
constexpr int kSteps = 2;  // of 32 columns in a stage
constexpr int kStageColumns = kSteps * kStepColumns;
constexpr int kWeightBytes = kWarps * 2 * kSteps * kHalfTileBytes;
constexpr int kTokenBytes = kSteps * kTokenStepBytes;  // in a stage
// Of a weight: columns in stages and the end of the list stay below 2^31.
constexpr std::int64_t kMaxStages = std::int64_t{1} << 24;
constexpr int kTokenChunks = kTokenBytes / kChunkBytes;

struct Arguments {
  SkinnyRows rows;
  SkinnyTarget target;
  const std::uint16_t* x;
  std::int64_t x_stride;
  float4* partials;  // [2 * n_blocks][token tiles][kThreads]: of a block's first and last tile
  int* arrived;      // [n_tiles], zero between calls
  int n_stages;      // of all tiles
  int tile_stages;
  int n_tokens;
};

// What a block does: stages [begin, end).
__device__ int begin_of(const Arguments& a, int block) {
  return static_cast<int>(std::int64_t{a.n_stages} * block / gridDim.x);
}
__device__ int block_of(const Arguments& a, int stage) {
  return static_cast<int>(((std::int64_t{stage} + 1) * gridDim.x - 1) / a.n_stages);
}

template <LinearOutput kOutput, int kTokenTiles, int kStages>
__global__ __launch_bounds__(kThreads, 2) void split_kernel(const Arguments a) {
  constexpr int kWarpRows = kOutput == LinearOutput::kSwiglu ? 8 : 16;
  constexpr int kTileRows = kWarps * kWarpRows;
  constexpr int kCopies = (8 * kTokenTiles * kTokenChunks + kThreads - 1) / kThreads;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int is_last;

  const int thread = static_cast<int>(threadIdx.x);
  const int index = static_cast<int>(blockIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  const int stage_bytes = kWeightBytes + a.n_tokens * kTokenBytes;
  const auto ring = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const int own = warp * 2 * kSteps * kHalfTileBytes + lane * kChunkBytes;  // in a stage
  const int begin = begin_of(a, index);
  const int end = begin_of(a, index + 1);

  // Chunk i of x in a stage: 16 bytes of token i / kTokenChunks.
  const auto chunk_column = [](int i) { return i % kTokenChunks * (kChunkBytes / 2); };
  const auto chunk_place = [&](int i) {
    const int step = i % kTokenChunks / 4;
    return kWeightBytes + (step * a.n_tokens + i / kTokenChunks) * kTokenStepBytes +
           i % 4 * kChunkBytes;
  };

  int ahead = begin;
  int tile_ahead = begin / a.tile_stages;
  int column_ahead = begin % a.tile_stages * kStageColumns;
  int slot_ahead = 0;
  const std::uint16_t* upper_ahead = nullptr;
  const std::uint16_t* lower_ahead = nullptr;
  const auto find_rows = [&] {
    const std::int64_t row = std::int64_t{tile_ahead} * kTileRows + warp * kWarpRows + g;
    upper_ahead = a.rows.upper(row);
    lower_ahead = a.rows.lower(row);
  };
  const auto ask_for_weights = [&] {
    const std::uint32_t target = ring + slot_ahead * stage_bytes + own;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = column_ahead + step * kStepColumns + 8 * q;
      const int n_bytes = column < a.rows.n_in ? kChunkBytes : 0;
      const int from = column < a.rows.n_in ? column : 0;
      copy_async_weights(target + step * kHalfTileBytes, upper_ahead + from, n_bytes);
      copy_async_weights(target + (kSteps + step) * kHalfTileBytes, lower_ahead + from, n_bytes);
    }
  };
  const auto advance = [&] {
    ++ahead;
    slot_ahead = slot_ahead + 1 == kStages ? 0 : slot_ahead + 1;
    column_ahead += kStageColumns;
    if (column_ahead >= a.tile_stages * kStageColumns) {
      column_ahead = 0;
      ++tile_ahead;
      find_rows();
    }
  };

  const int first_column = column_ahead;
  find_rows();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (ahead < end) ask_for_weights();
    commit_copies();
    advance();
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  // The tokens of the stages already asked for. Plain loads, since groups of copies end in order.
  {
    uint4 early[(kStages - 1) * kCopies];
    int column = first_column;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        const int i = thread + c * kThreads;
        const int at = column + chunk_column(i);
        const bool there = i < a.n_tokens * kTokenChunks && at < a.rows.n_in;
        early[s * kCopies + c] =
            there ? *reinterpret_cast<const uint4*>(a.x + i / kTokenChunks * a.x_stride + at)
                  : make_uint4(0, 0, 0, 0);
      }
      column += kStageColumns;
      if (column >= a.tile_stages * kStageColumns) column = 0;
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        const int i = thread + c * kThreads;
        if (i < a.n_tokens * kTokenChunks) {
          *reinterpret_cast<uint4*>(shared + s * stage_bytes + chunk_place(i)) =
              early[s * kCopies + c];
        }
      }
    }
  }

  const int first_tile = begin / a.tile_stages;
  int tile = first_tile;
  int tile_stage = begin % a.tile_stages;
  int piece_begin = tile_stage;
  int slot = 0;
  float sums[kTokenTiles][4] = {};
  for (int stage = begin; stage < end; ++stage) {
    wait_for_copies<kStages - 2>();
    // x of this stage is there for all, and all have left the slot that is filled next.
    __syncthreads();
    if (ahead < end) {
      ask_for_weights();
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        const int i = thread + c * kThreads;
        if (i >= a.n_tokens * kTokenChunks) continue;
        const int column = column_ahead + chunk_column(i);
        const int n_bytes = column < a.rows.n_in ? kChunkBytes : 0;
        const int from = column < a.rows.n_in ? column : 0;
        copy_async_tokens(ring + slot_ahead * stage_bytes + chunk_place(i),
                          a.x + i / kTokenChunks * a.x_stride + from, n_bytes);
      }
    }
    commit_copies();
    advance();

    const unsigned char* here = shared + slot * stage_bytes;
    slot = slot + 1 == kStages ? 0 : slot + 1;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 upper = *reinterpret_cast<const uint4*>(here + own + step * kHalfTileBytes);
      const uint4 lower =
          *reinterpret_cast<const uint4*>(here + own + (kSteps + step) * kHalfTileBytes);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int token = 8 * n + g;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (token < a.n_tokens) {
          x = *reinterpret_cast<const uint4*>(here + kWeightBytes +
                                              (step * a.n_tokens + token) * kTokenStepBytes +
                                              q * kChunkBytes);
        }
        multiply(sums[n], upper.x, lower.x, upper.y, lower.y, x.x, x.y);
        multiply(sums[n], upper.z, lower.z, upper.w, lower.w, x.z, x.w);
      }
    }

    const bool ends_tile = ++tile_stage == a.tile_stages;
    if (!ends_tile && stage + 1 < end) continue;
    bool writes = true;
    if (!ends_tile || piece_begin != 0) {
      // A piece of a tile: the last block to come adds all pieces up.
      const int first = block_of(a, tile * a.tile_stages);
      const int last = block_of(a, (tile + 1) * a.tile_stages - 1);
      const auto partial = [&](int block) {
        const int piece = 2 * block + (begin_of(a, block) / a.tile_stages == tile ? 0 : 1);
        return a.partials + std::int64_t{piece} * (kTokenTiles * kThreads) + thread;
      };
      float4* mine = partial(index);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        __stcg(mine + n * kThreads, make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
      }
      __threadfence();
      __syncthreads();
      if (thread == 0) {
        is_last = atomicAdd(a.arrived + tile, 1) == last - first ? 1 : 0;
        if (is_last != 0) a.arrived[tile] = 0;
        __threadfence();
      }
      __syncthreads();
      writes = is_last != 0;
      if (writes) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0F;
        }
        for (int block = first; block <= last; ++block) {
          const float4* other = partial(block);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
            const float4 part = __ldcg(other + n * kThreads);
            sums[n][0] += part.x;
            sums[n][1] += part.y;
            sums[n][2] += part.z;
            sums[n][3] += part.w;
          }
        }
      }
    }
    if (writes) {
      const std::int64_t row = std::int64_t{tile} * kTileRows + warp * kWarpRows + g;
      constexpr int kAtOnce = kTokenTiles < 4 ? 2 * kTokenTiles : 8;  // loads of the residual
#pragma unroll
      for (int from = 0; from < 2 * kTokenTiles; from += kAtOnce) {
        float2 residual[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int token = 8 * ((from + i) / 2) + 2 * q + i % 2;
          residual[i] = make_float2(0.0F, 0.0F);
          if (token < a.n_tokens) residual[i] = residual_pair<kOutput>(a.target, row, token);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int token = 8 * ((from + i) / 2) + 2 * q + i % 2;
          if (token >= a.n_tokens) continue;
          const float(&pair)[4] = sums[(from + i) / 2];
          store_pair<kOutput>(a.target, row, token, pair[i % 2], pair[2 + i % 2], residual[i]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0F;
    }
    ++tile;
    tile_stage = 0;
    piece_begin = 0;
  }
}

struct Shape {
  int token_tiles;
  int stages;
  int blocks;  // per multiprocessor and product
};
constexpr Shape kShapes[kSplitVariants] = {{1, 6, 1}, {1, 6, 2}, {2, 6, 1}, {2, 6, 2},
                                           {4, 5, 1}, {4, 5, 2}, {8, 4, 1}, {8, 4, 2}};

using Kernel = void (*)(Arguments);

template <LinearOutput kOutput, int kVariant>
constexpr Kernel kKernel =
    split_kernel<kOutput, kShapes[kVariant].token_tiles, kShapes[kVariant].stages>;

template <LinearOutput kOutput, int... kVariants>
Kernel kernel_of_variant(int variant, std::integer_sequence<int, kVariants...>) {
  constexpr Kernel kKernels[] = {kKernel<kOutput, kVariants>...};
  return kKernels[variant];
}

Kernel kernel_of(LinearOutput output, int variant) {
  constexpr auto kAll = std::make_integer_sequence<int, kSplitVariants>();
  switch (output) {
    case LinearOutput::kBf16:
      return kernel_of_variant<LinearOutput::kBf16>(variant, kAll);
    case LinearOutput::kF32:
      return kernel_of_variant<LinearOutput::kF32>(variant, kAll);
    case LinearOutput::kAddF32:
      return kernel_of_variant<LinearOutput::kAddF32>(variant, kAll);
    case LinearOutput::kSwiglu:
      break;
  }
  return kernel_of_variant<LinearOutput::kSwiglu>(variant, kAll);
}

int needed_bytes(int variant, int n_tokens) {
  return kShapes[variant].stages * (kWeightBytes + n_tokens * kTokenBytes);
}

std::size_t partial_bytes(int variant, int n_blocks) {
  return std::size_t{2} * static_cast<std::size_t>(n_blocks) *
         static_cast<std::size_t>(kShapes[variant].token_tiles) * kThreads * sizeof(float4);
}

}  // namespace

void prepare_split_linear(const CudaContext& context) {
  for (int output = 0; output < kLinearOutputs; ++output) {
    for (int variant = 0; variant < kSplitVariants; ++variant) {
      cuda_check(
          cudaFuncSetAttribute(
              reinterpret_cast<const void*>(kernel_of(static_cast<LinearOutput>(output), variant)),
              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_for_blocks(context, 2)),
          "shared memory of the split product");
    }
  }
}

bool split_fits(const CudaContext& context, int variant, int n_tokens) {
  const Shape shape = kShapes[variant];
  return n_tokens <= 8 * shape.token_tiles && n_tokens > 4 * (shape.token_tiles - 1) &&
         needed_bytes(variant, n_tokens) + 16 <= bytes_for_blocks(context, 2) &&
         partial_bytes(variant, shape.blocks * context.n_multiprocessors()) <=
             context.blas_workspace_bytes();
}

std::string split_name(int variant) {
  const Shape shape = kShapes[variant];
  return "own split 128x" + std::to_string(8 * shape.token_tiles) + ", " +
         std::to_string(shape.stages) + " stages, " + std::to_string(shape.blocks) +
         (shape.blocks == 1 ? " block" : " blocks");
}

void split_linear(const CudaContext& context, LinearOutput output, int variant,
                  const SkinnyProduct& product) {
  CHECK(split_fits(context, variant, product.n_tokens), "too many rows for a split product");
  if (product.n_tokens == 0 || product.n_out == 0) return;
  const int tile_rows = kWarps * (output == LinearOutput::kSwiglu ? 8 : 16);
  Arguments a = {};
  a.rows = skinny_rows(output, product);
  a.target = skinny_target(output, product);
  a.x = &product.x->bits;
  a.x_stride = product.x_stride;
  a.n_tokens = product.n_tokens;
  const std::int64_t tile_stages = (product.n_in + kStageColumns - 1) / kStageColumns;
  const std::int64_t n_stages = (a.target.n_first + tile_rows - 1) / tile_rows * tile_stages;
  CHECK(n_stages <= kMaxStages, "weight too large for a split product");
  a.tile_stages = static_cast<int>(tile_stages);
  a.n_stages = static_cast<int>(n_stages);
  a.partials = reinterpret_cast<float4*>(context.blas_workspace());
  a.arrived = product.arrived;
  const std::int64_t blocks = std::min<std::int64_t>(
      n_stages, std::int64_t{kShapes[variant].blocks} * context.n_multiprocessors());
  // Two blocks fit on a multiprocessor, not three; linear_cuda.cu says why.
  const int bytes =
      std::max(needed_bytes(variant, product.n_tokens), bytes_for_blocks(context, 3) + 1);
  launch_chained(context, "split product", kernel_of(output, variant),
                 dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                 static_cast<std::size_t>(bytes), a);
}

}  // namespace spindle::kernels
