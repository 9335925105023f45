// Products with up to 16 rows of x (tokens), bound by reading the weights. The kernel of
// linear_cuda.cu reads all of x for every tile of W, which at 16 tokens is as much as the weights.
//
// Here a block has a multiprocessor for itself and takes one tile of 16 outputs after the other.
// Its 16 warps share the columns, and every lane keeps its part of x in registers (skinny_mma.cuh
// says which) while tiles go by. Weights come through a ring in shared memory with cp.async, over
// the ends of tiles. Where the columns are too many for that, they are taken in phases: the x of a
// phase serves two tiles, whose sums stay in registers, before the next phase.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/skinny_mma.cuh"

namespace spindle::kernels {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokenTiles = kResidentTokens / 8;
constexpr int kStages = 12;   // steps in a warp's ring
constexpr int kMaxSteps = 8;  // of a warp in a phase
constexpr int kStageBytes = 2 * kHalfTileBytes;
constexpr int kRingBytes = kWarps * kStages * kStageBytes;
constexpr int kMeetingFloats = kWarps * kTokenTiles * 32 * 4;
constexpr int kSharedBytes = kRingBytes + 2 * kMeetingFloats * static_cast<int>(sizeof(float));

struct Arguments {
  SkinnyRows rows;
  SkinnyTarget target;
  const std::uint16_t* x;
  std::int64_t x_stride;
  int n_tiles;
  int n_phases;
  int n_steps;  // of one warp in one phase
  int n_tokens;
};

// Where copies are: the next step to ask for. Steps of a tile, then of the other tile of the group
// in the same phase, then phases, then groups of kGroup tiles.
template <int kGroup, int kTileRows>
struct Cursor {
  const Arguments& a;
  int g;
  int tile = 0;  // first of the group
  int member = 0;
  int phase = 0;
  int step = 0;
  const std::uint16_t* upper = nullptr;
  const std::uint16_t* lower = nullptr;

  __device__ Cursor(const Arguments& arguments, int row) : a(arguments), g(row) {
    tile = static_cast<int>(blockIdx.x);
    find_rows();
  }
  __device__ int tile_of(int i) const { return tile + i * static_cast<int>(gridDim.x); }
  __device__ bool is_over() const { return tile >= a.n_tiles; }
  __device__ void find_rows() {
    const std::int64_t row = std::int64_t{tile_of(member)} * kTileRows + g;
    upper = a.rows.upper(row);
    lower = a.rows.lower(row);
  }
  __device__ void advance() {
    if (++step < a.n_steps) return;
    step = 0;
    if (member + 1 < kGroup && tile_of(member + 1) < a.n_tiles) {
      ++member;
    } else {
      member = 0;
      if (++phase == a.n_phases) {
        phase = 0;
        tile = tile_of(kGroup);
      }
    }
    find_rows();
  }
};

template <LinearOutput kOutput, int kGroup>
__global__ __launch_bounds__(kThreads, 1) void resident_kernel(const Arguments a) {
  // Outputs of a tile, counted as rows of the upper halves for kSwiglu.
  constexpr int kTileRows = kOutput == LinearOutput::kSwiglu ? 8 : 16;
  extern __shared__ __align__(16) unsigned char shared[];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  const unsigned char* ring = shared + warp * kStages * kStageBytes + lane * kChunkBytes;
  const auto ring_address = static_cast<std::uint32_t>(__cvta_generic_to_shared(ring));
  auto* meetings = reinterpret_cast<float*>(shared + kRingBytes);

  // A warp takes lines of 64 columns in turn with the others, as two steps.
  const auto column_of = [&](int phase, int step) {
    step += phase * a.n_steps;
    return static_cast<std::int64_t>(step / 2 * kWarps + warp) * (2 * kStepColumns) +
           step % 2 * kStepColumns + 8 * q;
  };

  Cursor<kGroup, kTileRows> ahead(a, g);
  int slot_ahead = 0;
  const auto ask_ahead = [&] {
    if (!ahead.is_over()) {
      const std::int64_t column = column_of(ahead.phase, ahead.step);
      const bool there = column < a.rows.n_in;
      const std::int64_t from = there ? column : 0;
      const std::uint32_t target = ring_address + slot_ahead * kStageBytes;
      copy_async_weights(target, ahead.upper + from, there ? kChunkBytes : 0);
      copy_async_weights(target + kHalfTileBytes, ahead.lower + from, there ? kChunkBytes : 0);
      ahead.advance();
    }
    commit_copies();
    slot_ahead = slot_ahead + 1 == kStages ? 0 : slot_ahead + 1;
  };
  for (int s = 0; s < kStages - 1; ++s) ask_ahead();
  let_next_kernel_start();
  wait_for_previous_kernel();

  uint4 x[kMaxSteps][kTokenTiles];
  const auto load_x = [&](int phase) {
#pragma unroll
    for (int step = 0; step < kMaxSteps; ++step) {
      const std::int64_t column = column_of(phase, step);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int token = 8 * n + g;
        const bool there = step < a.n_steps && token < a.n_tokens && column < a.rows.n_in;
        x[step][n] = there ? *reinterpret_cast<const uint4*>(a.x + token * a.x_stride + column)
                           : make_uint4(0, 0, 0, 0);
      }
    }
  };
  if (kGroup == 1) load_x(0);

  // Which outputs this thread adds up: rows `out_row` and its twin of one token.
  const int out_row = threadIdx.x % 8;
  const int out_token = threadIdx.x / 8;
  const int out_part = out_token / 8 * 32 + out_row * 4 + out_token % 8 / 2;
  const bool adds_up = out_token < a.n_tokens;

  int slot = 0;
  int n_met = 0;
  for (int first = blockIdx.x; first < a.n_tiles; first += kGroup * static_cast<int>(gridDim.x)) {
    float sums[kGroup][kTokenTiles][4] = {};
    for (int phase = 0; phase < a.n_phases; ++phase) {
      if (kGroup > 1) load_x(phase);
#pragma unroll
      for (int member = 0; member < kGroup; ++member) {
        if (first + member * static_cast<int>(gridDim.x) >= a.n_tiles) break;
#pragma unroll
        for (int step = 0; step < kMaxSteps; ++step) {
          if (step >= a.n_steps) break;
          wait_for_copies<kStages - 2>();
          const uint4 upper = *reinterpret_cast<const uint4*>(ring + slot * kStageBytes);
          const uint4 lower =
              *reinterpret_cast<const uint4*>(ring + slot * kStageBytes + kHalfTileBytes);
          ask_ahead();
          slot = slot + 1 == kStages ? 0 : slot + 1;
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
            float(&sum)[4] = sums[member][n];
            multiply(sum, upper.x, lower.x, upper.y, lower.y, x[step][n].x, x[step][n].y);
            multiply(sum, upper.z, lower.z, upper.w, lower.w, x[step][n].z, x[step][n].w);
          }
        }
      }
    }
#pragma unroll
    for (int member = 0; member < kGroup; ++member) {
      const std::int64_t tile = first + std::int64_t{member} * gridDim.x;
      if (tile >= a.n_tiles) break;
      // Two places to meet in turn: who adds up the last tile is not waited for.
      float* meeting = meetings + n_met % 2 * kMeetingFloats;
      ++n_met;
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const float(&sum)[4] = sums[member][n];
        *reinterpret_cast<float4*>(meeting + ((warp * kTokenTiles + n) * 32 + lane) * 4) =
            make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
      const std::int64_t row = tile * kTileRows + out_row;
      float2 residual = make_float2(0.0F, 0.0F);
      if (adds_up) residual = residual_pair<kOutput>(a.target, row, out_token);
      __syncthreads();
      if (!adds_up) continue;
      float upper = 0.0F;
      float lower = 0.0F;
#pragma unroll
      for (int from = 0; from < kWarps; ++from) {
        const float* parts = meeting + (from * kTokenTiles * 32 + out_part) * 4 + out_token % 2;
        upper += parts[0];
        lower += parts[2];
      }
      store_pair<kOutput>(a.target, row, out_token, upper, lower, residual);
    }
  }
}

using Kernel = void (*)(Arguments);

template <LinearOutput kOutput>
Kernel kernel_of_group(int group) {
  return group == 1 ? resident_kernel<kOutput, 1> : resident_kernel<kOutput, 2>;
}
Kernel kernel_of(LinearOutput output, int group) {
  switch (output) {
    case LinearOutput::kBf16:
      return kernel_of_group<LinearOutput::kBf16>(group);
    case LinearOutput::kF32:
      return kernel_of_group<LinearOutput::kF32>(group);
    case LinearOutput::kAddF32:
      return kernel_of_group<LinearOutput::kAddF32>(group);
    case LinearOutput::kSwiglu:
      break;
  }
  return kernel_of_group<LinearOutput::kSwiglu>(group);
}

}  // namespace

bool resident_fits(const CudaContext& context, int n_tokens) {
  return n_tokens <= kResidentTokens && kSharedBytes <= context.shared_bytes_per_block();
}

void prepare_resident_linear(const CudaContext& context) {
  if (!resident_fits(context, 1)) return;
  for (int output = 0; output < kLinearOutputs; ++output) {
    for (const int group : {1, 2}) {
      cuda_check(cudaFuncSetAttribute(reinterpret_cast<const void*>(
                                          kernel_of(static_cast<LinearOutput>(output), group)),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
                 "shared memory of the skinny product");
    }
  }
}

void resident_linear(const CudaContext& context, LinearOutput output,
                     const SkinnyProduct& product) {
  CHECK(resident_fits(context, product.n_tokens), "too many rows for a skinny product");
  if (product.n_tokens == 0 || product.n_out == 0) return;
  const int tile_rows = output == LinearOutput::kSwiglu ? 8 : 16;
  Arguments a = {};
  a.rows = skinny_rows(output, product);
  a.target = skinny_target(output, product);
  a.x = &product.x->bits;
  a.x_stride = product.x_stride;
  a.n_tiles = static_cast<int>((a.target.n_first + tile_rows - 1) / tile_rows);
  const std::int64_t lines = (product.n_in + 2 * kStepColumns - 1) / (2 * kStepColumns);
  const int n_steps = static_cast<int>(2 * ((lines + kWarps - 1) / kWarps));
  a.n_phases = (n_steps + kMaxSteps - 1) / kMaxSteps;
  a.n_steps = (n_steps + a.n_phases - 1) / a.n_phases;
  a.n_tokens = product.n_tokens;
  const int blocks = std::min(a.n_tiles, context.n_multiprocessors());
  launch_chained(context, "skinny product", kernel_of(output, a.n_phases == 1 ? 1 : 2),
                 dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                 static_cast<std::size_t>(kSharedBytes), a);
}

}  // namespace spindle::kernels
