#pragma once
// All cosines of codebook_match, on tensor cores and by many CTAs a tile: 64 x 64 blocks of the
// tile's similarity graph, and blocks of 64 rows against a share of the earlier entries.
//
// A cosine is the fp32 sum of products of f16 parts: a unit vector is 64 u = high + low, which is
// exact to 2^-22 relative or 2^-31 absolute, and low times low is left out. The small terms are
// added first. Together with the tensor core's additions a cosine is within about 1e-6 of exact.
//
// For codebook_cuda.cu only.

#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>

#include "kernels/codebook.h"
#include "kernels/cuda/kv_codec.cuh"

namespace spindle::kernels::codebook {

using codec::Eight;
using codec::kAllLanes;

inline constexpr int kTileRows = static_cast<int>(kCodebookTileTokens);
inline constexpr int kWords = kTileRows / 32;  // of a row of the graph
inline constexpr int kBlockRows = 64;
inline constexpr int kBlocks = kTileRows / kBlockRows;
inline constexpr int kGraphBlocks = kBlocks * (kBlocks + 1) / 2;
inline constexpr int kSplits = 8;  // shares of the earlier entries
inline constexpr int kProductThreads = 128;
inline constexpr float kUnitScale = 64.0F;
inline constexpr std::uint32_t kNoEntry = 0xffffffffU;

struct Nearest {
  float cos;
  std::uint32_t entry;
};

struct Workspace {
  std::uint32_t graph[kTileRows * kWords];  // bit b of row a: cos(a, b) > theta, or a == b
  Nearest nearest[kSplits * kTileRows];
};

// Whether candidate is nearer, or as near and earlier.
__device__ __forceinline__ bool is_nearer(const Nearest& candidate, const Nearest& best) {
  return candidate.cos > best.cos || (candidate.cos == best.cos && candidate.entry < best.entry);
}

// ||row|| as the CPU body has it. Lanes 2 i and 2 i + 1 share a row; all lanes take part.
template <int kDim>
__device__ float norm_of(const std::uint16_t* row, int part) {
  double square = 0;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const Eight eight = codec::load_eight(row + (2 * i + part) * 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const auto value = static_cast<double>(codec::f16_value(eight.at[j]));
      square = __fma_rn(value, value, square);
    }
  }
  square += __shfl_xor_sync(kAllLanes, square, 1);
  return __double2float_rn(__dsqrt_rn(square));
}

__device__ __forceinline__ bool has_direction(float norm) {
  return norm > 0.0F && norm < __int_as_float(0x7f800000);
}

// 64 vectors in shared memory, rows padded by 16 bytes so that ldmatrix meets no bank twice.
template <int kDim>
struct Vectors {
  static constexpr int kStride = kDim + 8;
  alignas(16) std::uint16_t values[kBlockRows * kStride];
};

// Unit vectors of the rows [first, first + 64) of a tile in two parts; zeros past the last row.
// Answers the norm of row threadIdx.x / 2 of them.
template <int kDim>
__device__ float load_units(const DeviceCodebookTile& tile, int first, Vectors<kDim>& high,
                            Vectors<kDim>& low) {
  const int row = static_cast<int>(threadIdx.x) / 2;
  const int part = static_cast<int>(threadIdx.x) % 2;
  const bool inside = first + row < tile.n_rows;
  const auto* from =
      reinterpret_cast<const std::uint16_t*>(tile.rows) + (inside ? first + row : 0) * kDim;
  const float norm = norm_of<kDim>(from, part);
  const bool directed = inside && has_direction(norm);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const int channel = (2 * i + part) * 8;
    const Eight in = codec::load_eight(from + channel);
    Eight high_bits;
    Eight low_bits;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float unit = directed ? __fdiv_rn(codec::f16_value(in.at[j]), norm) : 0.0F;
      const float scaled = unit * kUnitScale;
      high_bits.at[j] = codec::f16_bits(scaled);
      low_bits.at[j] = codec::f16_bits(scaled - codec::f16_value(high_bits.at[j]));
    }
    codec::store_eight(high.values + row * Vectors<kDim>::kStride + channel, high_bits);
    codec::store_eight(low.values + row * Vectors<kDim>::kStride + channel, low_bits);
  }
  return norm;
}

__device__ __forceinline__ void load_matrices(const std::uint16_t* from, std::uint32_t (&to)[4]) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply_add(const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1, float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Adds rows a [16 of this warp] times rows b [64]: products[n] has the columns [8 n, 8 n + 8), of
// which lane (g, q) holds columns 2 q, 2 q + 1 of row g and then of row g + 8.
using Products = float[kBlockRows / 8][4];
template <int kDim>
__device__ __forceinline__ void add_products(const Vectors<kDim>& a, const Vectors<kDim>& b,
                                             Products& products) {
  constexpr int kStride = Vectors<kDim>::kStride;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::uint16_t* a_row = a.values + (warp * 16 + lane % 16) * kStride + lane / 16 * 8;
  const std::uint16_t* b_row = b.values + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    std::uint32_t a_part[4];
    load_matrices(a_row + k, a_part);
#pragma unroll
    for (int n = 0; n < kBlockRows / 8; n += 2) {
      std::uint32_t b_part[4];
      load_matrices(b_row + n * 8 * kStride + k, b_part);
      multiply_add(a_part, b_part[0], b_part[1], products[n]);
      multiply_add(a_part, b_part[2], b_part[3], products[n + 1]);
    }
  }
}

template <int kDim>
struct ProductShared {
  Vectors<kDim> a_high;
  Vectors<kDim> a_low;
  Vectors<kDim> b_high;  // entries use b_high and b_low as two stages
  Vectors<kDim> b_low;
  std::uint32_t bits[kBlockRows][2];
};

// Block (row_block, column_block >= row_block) of the graph and its mirror image. Only the part
// above the diagonal is computed, so that the graph is symmetric to the bit.
template <int kDim>
__device__ void graph_block(const DeviceCodebookTile& tile, int row_block, int column_block,
                            ProductShared<kDim>& shared, Workspace& workspace) {
  const int first_row = row_block * kBlockRows;
  const int first_column = column_block * kBlockRows;
  if (first_column >= tile.n_rows) return;
  const bool diagonal = row_block == column_block;
  const int thread = static_cast<int>(threadIdx.x);
  const float norm = load_units<kDim>(tile, first_row, shared.a_high, shared.a_low);
  if (diagonal && thread % 2 == 0 && first_row + thread / 2 < tile.n_rows) {
    tile.magnitudes[first_row + thread / 2] = codec::f16_bits(fminf(norm, 65504.0F));
  }
  if (!diagonal) load_units<kDim>(tile, first_column, shared.b_high, shared.b_low);
  const Vectors<kDim>& b_high = diagonal ? shared.a_high : shared.b_high;
  const Vectors<kDim>& b_low = diagonal ? shared.a_low : shared.b_low;
  __syncthreads();

  Products products = {};
  add_products<kDim>(shared.a_high, b_low, products);
  add_products<kDim>(shared.a_low, b_high, products);
  add_products<kDim>(shared.a_high, b_high, products);

  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  std::uint32_t words[2][2] = {};
#pragma unroll
  for (int n = 0; n < kBlockRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = n * 8 + lane % 4 * 2 + e % 2;
      const int own_row = row + e / 2 * 8;
      const float cos = products[n][e] * (1.0F / (kUnitScale * kUnitScale));
      const bool inside = first_row + own_row < tile.n_rows &&
                          first_column + column < tile.n_rows && !(diagonal && column <= own_row);
      if (inside && cos > tile.theta) words[e / 2][n / 4] |= 1U << (column % 32);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      words[half][w] |= __shfl_xor_sync(kAllLanes, words[half][w], 1);
      words[half][w] |= __shfl_xor_sync(kAllLanes, words[half][w], 2);
      if (lane % 4 == 0) shared.bits[row + half * 8][w] = words[half][w];
    }
  }
  __syncthreads();

  const int index = thread / 2;  // row, and column of the mirror image
  const int w = thread % 2;
  std::uint32_t own = shared.bits[index][w];
  std::uint32_t mirror = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    mirror |= ((shared.bits[w * 32 + i][index / 32] >> (index % 32)) & 1U) << i;
  }
  if (diagonal) {
    own |= mirror;
    if (index / 32 == w && first_row + index < tile.n_rows) own |= 1U << (index % 32);
  } else {
    workspace.graph[(first_column + index) * kWords + row_block * 2 + w] = mirror;
  }
  workspace.graph[(first_row + index) * kWords + column_block * 2 + w] = own;
}

// The rows of a block against every kSplits-th block of 64 earlier entries.
template <int kDim>
__device__ void match_block(const DeviceCodebookTile& tile, int row_block, int split,
                            ProductShared<kDim>& shared, Workspace& workspace) {
  const int first_row = row_block * kBlockRows;
  const int n_entries = *tile.n_entries;
  if (first_row >= tile.n_rows || n_entries > tile.max_entries || split * kBlockRows >= n_entries) {
    return;
  }
  const auto* entries = reinterpret_cast<const std::uint16_t*>(tile.entries);
  const int thread = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int first, Vectors<kDim>& to) {
    for (int item = thread; item < kBlockRows * kDim / 8; item += kProductThreads) {
      const int entry = item / (kDim / 8);
      const int channel = item % (kDim / 8) * 8;
      const bool inside = first + entry < n_entries;
      const std::int64_t from = inside ? std::int64_t{first + entry} * kDim + channel : 0;
      __pipeline_memcpy_async(to.values + entry * Vectors<kDim>::kStride + channel, entries + from,
                              16, inside ? 0 : 16);
    }
    __pipeline_commit();
  };
  const int step = kSplits * kBlockRows;
  fetch(split * kBlockRows, shared.b_high);
  load_units<kDim>(tile, first_row, shared.a_high, shared.a_low);

  const int lane = thread % 32;
  Nearest nearest[2] = {{tile.theta, kNoEntry}, {tile.theta, kNoEntry}};
  int stage = 0;
  for (int first = split * kBlockRows; first < n_entries; first += step, stage ^= 1) {
    const Vectors<kDim>& b = stage == 0 ? shared.b_high : shared.b_low;
    if (first + step < n_entries) {
      fetch(first + step, stage == 0 ? shared.b_low : shared.b_high);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    Products products = {};
    add_products<kDim>(shared.a_low, b, products);
    add_products<kDim>(shared.a_high, b, products);
#pragma unroll
    for (int n = 0; n < kBlockRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int entry = first + n * 8 + lane % 4 * 2 + e % 2;
        const float cos = products[n][e] * (1.0F / kUnitScale);
        if (entry < n_entries && cos > nearest[e / 2].cos) {
          nearest[e / 2] = {cos, static_cast<std::uint32_t>(entry)};
        }
      }
    }
    __syncthreads();  // before the next fetch writes over this stage
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const Nearest other{__shfl_xor_sync(kAllLanes, nearest[half].cos, lanes),
                          __shfl_xor_sync(kAllLanes, nearest[half].entry, lanes)};
      if (is_nearer(other, nearest[half])) nearest[half] = other;
    }
    if (lane % 4 == 0) {
      const int row = first_row + thread / 32 * 16 + lane / 4 + half * 8;
      workspace.nearest[split * kTileRows + row] = nearest[half];
    }
  }
}

// Work item blockIdx.x of tile blockIdx.y.
template <int kDim>
__global__ void __launch_bounds__(kProductThreads)
    products_kernel(const DeviceCodebookTile* tiles, Workspace* workspaces) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<ProductShared<kDim>*>(memory);
  const DeviceCodebookTile tile = tiles[blockIdx.y];
  Workspace& workspace = workspaces[blockIdx.y];
  int item = static_cast<int>(blockIdx.x);
  if (item >= kGraphBlocks) {
    item -= kGraphBlocks;
    match_block<kDim>(tile, item % kBlocks, item / kBlocks, shared, workspace);
    return;
  }
  int column_block = 0;
  while ((column_block + 1) * (column_block + 2) / 2 <= item) ++column_block;
  graph_block<kDim>(tile, item - column_block * (column_block + 1) / 2, column_block, shared,
                    workspace);
}

}  // namespace spindle::kernels::codebook
