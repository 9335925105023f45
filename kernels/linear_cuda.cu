// Products with few rows of x (tokens), bound by reading the weights.
//
// A block owns a tile of 16 or 32 outputs at a time and its 8 warps share the columns of W; their
// partial sums meet in shared memory. Every lane copies what it will use itself (skinny_mma.cuh)
// through a ring in shared memory with cp.async, several steps ahead, over the ends of tiles,
// without a barrier. The first weights are asked for before the previous kernel has ended.
//
// Every tile reads all of x, which at 16 tokens is as much as the weights; linear_resident_cuda.cu
// does not.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
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
constexpr int kSumBytes = 32 * 4 * 4;  // of a warp's sums for one mma tile

struct Arguments {
  SkinnyRows rows;
  SkinnyTarget target;
  const std::uint16_t* x;
  std::int64_t x_stride;
  int n_tiles;
  int n_steps;  // of one warp in one tile
  int n_tokens;
};

// kRowTiles mma tiles of rows and kTokenTiles of tokens in a block's tile; kStages steps in the
// ring.
template <LinearOutput kOutput, int kRowTiles, int kTokenTiles, int kStages>
__global__ __launch_bounds__(kThreads, 2) void skinny_kernel(const Arguments a) {
  // Outputs of a block's tile, counted as rows of the upper halves for kSwiglu.
  constexpr int kSubTileRows = kOutput == LinearOutput::kSwiglu ? 8 : 16;
  constexpr int kTileRows = kSubTileRows * kRowTiles;
  constexpr int kWeightBytes = 2 * kRowTiles * kHalfTileBytes;
  constexpr int kSums = kRowTiles * kTokenTiles;
  extern __shared__ __align__(16) unsigned char shared[];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  const int stage_bytes = kWeightBytes + a.n_tokens * kTokenStepBytes;
  unsigned char* ring = shared + warp * kStages * stage_bytes;
  const auto ring_address = static_cast<std::uint32_t>(__cvta_generic_to_shared(ring));
  auto* meeting = reinterpret_cast<float*>(shared + kWarps * kStages * stage_bytes);

  // A warp takes lines of 64 columns in turn with the others, as two steps.
  const auto column_of = [&](int step) {
    return static_cast<std::int64_t>(step / 2 * kWarps + warp) * (2 * kStepColumns) +
           step % 2 * kStepColumns + 8 * q;
  };

  // Where copies are: the next step to ask for.
  std::int64_t tile_ahead = blockIdx.x;
  int step_ahead = 0;
  int slot_ahead = 0;
  const std::uint16_t* rows_ahead[2 * kRowTiles];
  const auto find_rows = [&] {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      const std::int64_t row = tile_ahead * kTileRows + t * kSubTileRows + g;
      rows_ahead[2 * t] = a.rows.upper(row);
      rows_ahead[2 * t + 1] = a.rows.lower(row);
    }
  };
  const auto ask_for_weights = [&](std::int64_t column) {
    const int n_bytes = column < a.rows.n_in ? kChunkBytes : 0;
    const std::int64_t from = column < a.rows.n_in ? column : 0;
    const std::uint32_t target = ring_address + slot_ahead * stage_bytes + lane * kChunkBytes;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      copy_async_weights(target + r * kHalfTileBytes, rows_ahead[r] + from, n_bytes);
    }
  };
  const auto advance = [&] {
    slot_ahead = slot_ahead + 1 == kStages ? 0 : slot_ahead + 1;
    if (++step_ahead == a.n_steps) {
      step_ahead = 0;
      tile_ahead += gridDim.x;
      if (tile_ahead < a.n_tiles) find_rows();
    }
  };

  find_rows();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (tile_ahead < a.n_tiles) ask_for_weights(column_of(step_ahead));
    commit_copies();
    advance();
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  // The tokens of the steps already asked for. Plain loads: groups of copies end in order.
  uint4 early[(kStages - 1) * kTokenTiles];
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    const std::int64_t column = column_of(s % a.n_steps);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = 8 * n + g;
      const bool there = token < a.n_tokens && column < a.rows.n_in;
      early[s * kTokenTiles + n] =
          there ? *reinterpret_cast<const uint4*>(a.x + token * a.x_stride + column)
                : make_uint4(0, 0, 0, 0);
    }
  }
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = 8 * n + g;
      if (token < a.n_tokens) {
        *reinterpret_cast<uint4*>(ring + s * stage_bytes + kWeightBytes + token * kTokenStepBytes +
                                  q * kChunkBytes) = early[s * kTokenTiles + n];
      }
    }
  }

  // Which outputs this thread adds up: rows `out_row` and its twin of one token.
  const int out_row = threadIdx.x % 8;
  const int out_token = threadIdx.x / 8 % 8;
  const int out_sums = threadIdx.x / 64;  // block of sums
  const int out_lane = out_row * 4 + out_token / 2;

  int slot = 0;
  for (std::int64_t tile = blockIdx.x; tile < a.n_tiles; tile += gridDim.x) {
    const std::int64_t row = tile * kTileRows + out_sums / kTokenTiles * kSubTileRows + out_row;
    const int token = out_sums % kTokenTiles * 8 + out_token;
    const bool adds_up = out_sums < kSums && token < a.n_tokens;
    float2 residual = make_float2(0.0F, 0.0F);
    if (adds_up) residual = residual_pair<kOutput>(a.target, row, token);

    float sums[kSums][4] = {};
    for (int step = 0; step < a.n_steps; ++step) {
      wait_for_copies<kStages - 2>();
      const unsigned char* stage = ring + slot * stage_bytes;
      uint4 w[2 * kRowTiles];
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        w[r] = *reinterpret_cast<const uint4*>(stage + r * kHalfTileBytes + lane * kChunkBytes);
      }
      uint4 x[kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        x[n] = make_uint4(0, 0, 0, 0);
        if (8 * n + g < a.n_tokens) {
          x[n] = *reinterpret_cast<const uint4*>(stage + kWeightBytes +
                                                 (8 * n + g) * kTokenStepBytes + q * kChunkBytes);
        }
      }
      if (tile_ahead < a.n_tiles) {
        const std::int64_t column = column_of(step_ahead);
        ask_for_weights(column);
        const int n_bytes = column < a.rows.n_in ? kChunkBytes : 0;
        const std::int64_t from = column < a.rows.n_in ? column : 0;
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const int ahead = 8 * n + g;
          if (ahead < a.n_tokens) {
            copy_async_tokens(ring_address + slot_ahead * stage_bytes + kWeightBytes +
                                  ahead * kTokenStepBytes + q * kChunkBytes,
                              a.x + ahead * a.x_stride + from, n_bytes);
          }
        }
      }
      commit_copies();
      advance();
      slot = slot + 1 == kStages ? 0 : slot + 1;
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        const uint4 upper = w[2 * t];
        const uint4 lower = w[2 * t + 1];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          float(&sum)[4] = sums[t * kTokenTiles + n];
          multiply(sum, upper.x, lower.x, upper.y, lower.y, x[n].x, x[n].y);
          multiply(sum, upper.z, lower.z, upper.w, lower.w, x[n].z, x[n].w);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      *reinterpret_cast<float4*>(meeting + ((warp * kSums + i) * 32 + lane) * 4) =
          make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    }
    __syncthreads();
    if (adds_up) {
      float upper = 0.0F;
      float lower = 0.0F;
#pragma unroll
      for (int from = 0; from < kWarps; ++from) {
        const float* parts =
            meeting + ((from * kSums + out_sums) * 32 + out_lane) * 4 + out_token % 2;
        upper += parts[0];
        lower += parts[2];
      }
      store_pair<kOutput>(a.target, row, token, upper, lower, residual);
    }
    __syncthreads();
  }
}

struct Shape {
  int row_tiles;
  int token_tiles;
  int stages;
};
constexpr int kRingVariants = kResidentVariant;
constexpr Shape kShapes[kRingVariants] = {{1, 1, 9}, {1, 1, 6},  {2, 1, 5},
                                          {1, 2, 6}, {1, 1, 12}, {2, 2, 4}};

using Kernel = void (*)(Arguments);

template <LinearOutput kOutput, int kVariant>
constexpr Kernel kKernel = skinny_kernel<kOutput, kShapes[kVariant].row_tiles,
                                         kShapes[kVariant].token_tiles, kShapes[kVariant].stages>;

template <LinearOutput kOutput, int... kVariants>
Kernel kernel_of_variant(int variant, std::integer_sequence<int, kVariants...>) {
  constexpr Kernel kKernels[] = {kKernel<kOutput, kVariants>...};
  return kKernels[variant];
}

Kernel kernel_of(LinearOutput output, int variant) {
  constexpr auto kAll = std::make_integer_sequence<int, kRingVariants>();
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
  const Shape shape = kShapes[variant];
  const int stage = 2 * shape.row_tiles * kHalfTileBytes + n_tokens * kTokenStepBytes;
  const int meeting = kWarps * shape.row_tiles * shape.token_tiles * kSumBytes;
  return kWarps * shape.stages * stage + meeting;
}

void launch(const CudaContext& context, LinearOutput output, Kernel kernel, const Shape& shape,
            int n_bytes, const SkinnyProduct& product) {
  if (product.n_tokens == 0 || product.n_out == 0) return;
  const int tile_rows = (output == LinearOutput::kSwiglu ? 8 : 16) * shape.row_tiles;
  Arguments a = {};
  a.rows = skinny_rows(output, product);
  a.target = skinny_target(output, product);
  a.x = &product.x->bits;
  a.x_stride = product.x_stride;
  a.n_tiles = static_cast<int>((a.target.n_first + tile_rows - 1) / tile_rows);
  const std::int64_t lines = (product.n_in + 2 * kStepColumns - 1) / (2 * kStepColumns);
  a.n_steps = static_cast<int>(2 * ((lines + kWarps - 1) / kWarps));
  a.n_tokens = product.n_tokens;
  // Two blocks fit on a multiprocessor, not three, and every product has two for each of them. So
  // when blocks of the next product take the places of those that end, each multiprocessor gets two
  // again; with room for three, or with fewer blocks, some get more work than others.
  const int bytes = std::max(n_bytes, bytes_for_blocks(context, 3) + 1);
  const int blocks = std::min(a.n_tiles, 2 * context.n_multiprocessors());
  launch_chained(context, "skinny product", kernel, dim3(static_cast<unsigned>(blocks)),
                 dim3(kThreads), static_cast<std::size_t>(bytes), a);
}

__device__ std::uint16_t rounded(std::uint32_t bits) {
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

template <bool kHalf>
__global__ void round_kernel(const void* source, std::int64_t n, std::uint16_t* out) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const float value = kHalf ? __half2float(static_cast<const __half*>(source)[i])
                              : static_cast<const float*>(source)[i];
    out[i] = rounded(__float_as_uint(value));
  }
}

__global__ void fill_kernel(__nv_bfloat16* out, std::int64_t n) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    std::uint32_t bits = static_cast<std::uint32_t>(i) * 2654435761U;
    bits ^= bits >> 15;
    bits *= 0x2c1b3c6dU;
    bits ^= bits >> 12;
    out[i] = __float2bfloat16_rn(static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-31F);
  }
}

constexpr int kElementThreads = 256;

unsigned element_blocks(const CudaContext& context, std::int64_t n) {
  const std::int64_t wanted = (n + kElementThreads - 1) / kElementThreads;
  return static_cast<unsigned>(
      std::min<std::int64_t>(wanted, std::int64_t{8} * context.n_multiprocessors()));
}

}  // namespace

void prepare_skinny_linear(const CudaContext& context) {
  prepare_resident_linear(context);
  for (int output = 0; output < kLinearOutputs; ++output) {
    for (int variant = 0; variant < kRingVariants; ++variant) {
      cuda_check(
          cudaFuncSetAttribute(
              reinterpret_cast<const void*>(kernel_of(static_cast<LinearOutput>(output), variant)),
              cudaFuncAttributeMaxDynamicSharedMemorySize, context.shared_bytes_per_block()),
          "shared memory of the skinny product");
    }
  }
}

bool skinny_fits(const CudaContext& context, int variant, int n_tokens) {
  if (variant == kResidentVariant) return resident_fits(context, n_tokens);
  return n_tokens <= 8 * kShapes[variant].token_tiles &&
         needed_bytes(variant, n_tokens) <= bytes_for_blocks(context, 2);
}

int skinny_default(const CudaContext& context, int n_tokens) {
  for (int variant = 0; variant < kRingVariants; ++variant) {
    if (n_tokens <= kSkinnyDefaultTokens && skinny_fits(context, variant, n_tokens)) return variant;
  }
  return -1;
}

std::string skinny_name(int variant) {
  if (variant == kResidentVariant) return "own 16x16, x in registers";
  const Shape shape = kShapes[variant];
  return "own " + std::to_string(16 * shape.row_tiles) + "x" +
         std::to_string(8 * shape.token_tiles) + ", " + std::to_string(shape.stages) + " stages";
}

void skinny_linear(const CudaContext& context, LinearOutput output, int variant,
                   const SkinnyProduct& product) {
  if (variant == kResidentVariant) return resident_linear(context, output, product);
  CHECK(skinny_fits(context, variant, product.n_tokens), "too many rows for a skinny product");
  launch(context, output, kernel_of(output, variant), kShapes[variant],
         needed_bytes(variant, product.n_tokens), product);
}

void round_to_bf16(const CudaContext& context, const void* source, DType dtype, std::int64_t n,
                   Bf16* out) {
  CHECK(dtype != DType::kBF16, "bf16 needs no rounding");
  if (n == 0) return;
  const unsigned blocks = element_blocks(context, n);
  if (dtype == DType::kF16) {
    round_kernel<true><<<blocks, kElementThreads, 0, context.stream()>>>(source, n, &out->bits);
  } else {
    round_kernel<false><<<blocks, kElementThreads, 0, context.stream()>>>(source, n, &out->bits);
  }
  check_launch("round to bf16");
}

void fill_for_tuning(const CudaContext& context, Bf16* out, std::int64_t n) {
  if (n == 0) return;
  fill_kernel<<<element_blocks(context, n), kElementThreads, 0, context.stream()>>>(
      reinterpret_cast<__nv_bfloat16*>(out), n);
  check_launch("fill");
}

}  // namespace spindle::kernels
