#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/codebook.h"
#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/codebook_products.cuh"
#include "kernels/cuda/kv_codec.cuh"

// Two launches: all cosines (codebook_products.cuh), then one CTA a tile that covers the graph
// greedily.

namespace spindle::kernels {
namespace {

using namespace codebook;  // NOLINT: its other half
using codec::Eight;
using codec::kAllLanes;

constexpr int kCoverThreads = 256;  // more warps would only repeat what every warp does in a step
constexpr int kCoverWarps = kCoverThreads / 32;
constexpr int kRowsPerThread = kTileRows / kCoverThreads;

struct CoverShared {
  std::uint32_t graph[kTileRows * kWords];
  std::uint32_t uncovered[kWords];
  std::uint32_t best[2][kCoverWarps];
  std::uint16_t picks[kTileRows];  // rows that become entries, in order
};

// The nearest earlier entry of a row, kNoEntry when none is near enough.
__device__ std::uint32_t nearest_entry(const Workspace& workspace, int row, int n_entries) {
  if (n_entries == 0) return kNoEntry;
  const int n_splits = min(kSplits, (n_entries + kBlockRows - 1) / kBlockRows);
  Nearest best = workspace.nearest[row];
  for (int split = 1; split < n_splits; ++split) {
    const Nearest other = workspace.nearest[split * kTileRows + row];
    if (is_nearer(other, best)) best = other;
  }
  return best.entry;
}

// The rest of a tile in greedy order. Row i + j kCoverThreads is row j of thread i; lane w of every
// warp holds the word w of the uncovered rows, so that a step has one barrier. Answers the number
// of picks, or -1 when there would be more than `limit`; `ref` is the pick that covers a row.
__device__ int cover(CoverShared& shared, int limit, int (&ref)[kRowsPerThread]) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const auto row_of = [&](int j) { return thread + j * kCoverThreads; };
  // The word of `lane`'s that has this thread's row j, and its bit.
  const auto bit_of = [&](std::uint32_t word, int j) {
    return __shfl_sync(kAllLanes, word, warp + j * kCoverWarps) >> lane & 1U;
  };
  std::uint32_t uncovered = shared.uncovered[lane];
  unsigned degree[kRowsPerThread] = {};  // uncovered neighbours; 0 once covered
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
    const int word = warp + j * kCoverWarps;
    const bool alive = bit_of(uncovered, j) != 0;
    if (__shfl_sync(kAllLanes, uncovered, word) == 0) continue;
    for (int r = 0; r < 32; ++r) {
      const unsigned neighbours = shared.graph[(word * 32 + r) * kWords + lane] & uncovered;
      const unsigned n = __reduce_add_sync(kAllLanes, static_cast<unsigned>(__popc(neighbours)));
      if (r == lane && alive) degree[j] = n;
    }
  }
  for (int pick = 0;; ++pick) {
    // Most uncovered neighbours first, then the lowest row.
    unsigned key = 0;
#pragma unroll
    for (int j = 0; j < kRowsPerThread; ++j) {
      key = max(key, degree[j] << 10 | static_cast<unsigned>(kTileRows - 1 - row_of(j)));
    }
    const unsigned warp_best = __reduce_max_sync(kAllLanes, key);
    if (lane == 0) shared.best[pick % 2][warp] = warp_best;
    __syncthreads();
    const unsigned best = __reduce_max_sync(kAllLanes, shared.best[pick % 2][lane % kCoverWarps]);
    const unsigned best_degree = best >> 10;
    if (best_degree == 0) return pick;
    if (best_degree == 1) {
      // Everyone left is alone: the order is that of the rows.
      const auto mine = static_cast<unsigned>(__popc(uncovered));
      const auto all = static_cast<int>(__reduce_add_sync(kAllLanes, mine));
      if (pick + all > limit) return -1;
#pragma unroll
      for (int j = 0; j < kRowsPerThread; ++j) {
        const int word = warp + j * kCoverWarps;
        const unsigned before = __reduce_add_sync(kAllLanes, lane < word ? mine : 0U);
        const std::uint32_t bits = __shfl_sync(kAllLanes, uncovered, word);
        if ((bits >> lane & 1U) == 0) continue;
        ref[j] = pick + static_cast<int>(before) + __popc(bits & ((1U << lane) - 1U));
        shared.picks[ref[j]] = static_cast<std::uint16_t>(row_of(j));
      }
      return pick + all;
    }
    if (pick >= limit) return -1;
    const int node = kTileRows - 1 - static_cast<int>(best & (kTileRows - 1U));
    const std::uint32_t covered = shared.graph[node * kWords + lane] & uncovered;
    uncovered ^= covered;
    if (thread == 0) shared.picks[pick] = static_cast<std::uint16_t>(node);
    unsigned counts[kRowsPerThread];
#pragma unroll
    for (int j = 0; j < kRowsPerThread; ++j) {
      if (bit_of(covered, j) != 0) {
        ref[j] = pick;
        degree[j] = 0;
      }
      counts[j] = bit_of(uncovered, j);
    }
    // No neighbour that is covered counts any more; two at a time, so that their loads overlap.
    for (unsigned words = __ballot_sync(kAllLanes, covered != 0); words != 0; words &= words - 1) {
      const int w = __ffs(static_cast<int>(words)) - 1;
      std::uint32_t bits = __shfl_sync(kAllLanes, covered, w);
      while (bits != 0) {
        const std::uint32_t* first =
            shared.graph + (w * 32 + __ffs(static_cast<int>(bits)) - 1) * kWords + warp;
        bits &= bits - 1;
        const unsigned is_pair = bits != 0 ? 1U : 0U;
        const std::uint32_t* second =
            is_pair != 0
                ? shared.graph + (w * 32 + __ffs(static_cast<int>(bits)) - 1) * kWords + warp
                : first;
        bits &= bits - 1;
        std::uint32_t near[2][kRowsPerThread];
#pragma unroll
        for (int j = 0; j < kRowsPerThread; ++j) {
          near[0][j] = first[j * kCoverWarps];
          near[1][j] = second[j * kCoverWarps];
        }
#pragma unroll
        for (int j = 0; j < kRowsPerThread; ++j) {
          degree[j] -= near[0][j] >> lane & counts[j];
          degree[j] -= near[1][j] >> lane & counts[j] & is_pair;
        }
      }
    }
  }
}

template <int kDim>
__device__ void write_entries(const DeviceCodebookTile& tile, const std::uint16_t* picks,
                              int n_picks, int first_entry) {
  const int part = static_cast<int>(threadIdx.x) % 2;
  for (int first = 0; first < n_picks; first += kCoverThreads / 2) {
    const int pick = first + static_cast<int>(threadIdx.x) / 2;
    const int row = pick < n_picks ? picks[pick] : 0;
    const auto* from = reinterpret_cast<const std::uint16_t*>(tile.rows) + row * kDim;
    const float norm = norm_of<kDim>(from, part);
    if (pick >= n_picks) continue;
    auto* to =
        reinterpret_cast<std::uint16_t*>(tile.entries) + std::int64_t{first_entry + pick} * kDim;
    const bool directed = has_direction(norm);
    for (int i = 0; i < kDim / 16; ++i) {
      const int channel = (2 * i + part) * 8;
      Eight eight = codec::load_eight(from + channel);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        eight.at[j] =
            directed ? codec::f16_bits(__fdiv_rn(codec::f16_value(eight.at[j]), norm)) : 0;
      }
      codec::store_eight(to + channel, eight);
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(kCoverThreads)
    cover_kernel(const DeviceCodebookTile* tiles, const Workspace* workspaces) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<CoverShared*>(memory);
  const DeviceCodebookTile tile = tiles[blockIdx.x];
  const Workspace& workspace = workspaces[blockIdx.x];
  const int thread = static_cast<int>(threadIdx.x);
  const int n_entries = *tile.n_entries;
  if (tile.n_rows == 0) return;
  if (n_entries > tile.max_entries) {
    if (thread == 0) *tile.n_entries = tile.max_entries + 1;
    return;
  }

  std::uint32_t match[kRowsPerThread];
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
    const int row = thread + j * kCoverThreads;
    const bool inside = row < tile.n_rows;
    match[j] = inside ? nearest_entry(workspace, row, n_entries) : kNoEntry;
    const std::uint32_t word = __ballot_sync(kAllLanes, inside && match[j] == kNoEntry);
    if (thread % 32 == 0) shared.uncovered[row / 32] = word;
  }
  // Words and rows of the graph past the last block are not written by the first kernel; they meet
  // zeros of `uncovered` only.
  const int n_blocks = (tile.n_rows + kBlockRows - 1) / kBlockRows;
#pragma unroll 8
  for (int item = thread; item < n_blocks * kBlockRows * kWords / 4; item += kCoverThreads) {
    if (item % (kWords / 4) * 4 >= n_blocks * 2) continue;
    reinterpret_cast<uint4*>(shared.graph)[item] =
        reinterpret_cast<const uint4*>(workspace.graph)[item];
  }
  __syncthreads();

  int ref[kRowsPerThread] = {};
  const int n_picks = cover(shared, tile.max_entries - n_entries, ref);
  __syncthreads();
  if (thread == 0) *tile.n_entries = n_picks < 0 ? tile.max_entries + 1 : n_entries + n_picks;
  if (n_picks < 0) return;
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
    const int row = thread + j * kCoverThreads;
    if (row >= tile.n_rows) continue;
    tile.refs[row] = static_cast<std::uint16_t>(
        match[j] == kNoEntry ? static_cast<std::uint32_t>(n_entries + ref[j]) : match[j]);
  }
  write_entries<kDim>(tile, shared.picks, n_picks, n_entries);
}

template <int kDim>
void launch_match(const CudaContext& context, const DeviceCodebookTile* tiles, int n_tiles,
                  Workspace* workspaces) {
  constexpr int kProductBytes = static_cast<int>(sizeof(ProductShared<kDim>));
  constexpr int kCoverBytes = static_cast<int>(sizeof(CoverShared));
  cuda_check(cudaFuncSetAttribute(products_kernel<kDim>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kProductBytes),
             "shared memory of codebook products");
  cuda_check(cudaFuncSetAttribute(cover_kernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kCoverBytes),
             "shared memory of the codebook cover");
  const dim3 grid(kGraphBlocks + kSplits * kBlocks, static_cast<unsigned>(n_tiles));
  products_kernel<kDim>
      <<<grid, kProductThreads, kProductBytes, context.stream()>>>(tiles, workspaces);
  check_launch("codebook products");
  cover_kernel<kDim>
      <<<static_cast<unsigned>(n_tiles), kCoverThreads, kCoverBytes, context.stream()>>>(
          tiles, workspaces);
  check_launch("codebook cover");
}

}  // namespace

std::size_t codebook_workspace_bytes(int head_dim) {
  CHECK(head_dim == 64 || head_dim == 128, "codebook head_dim");
  return sizeof(Workspace);
}

void codebook_match(const CudaContext& context, int head_dim, const DeviceCodebookTile* tiles,
                    int n_tiles, std::byte* workspace) {
  CHECK(head_dim == 64 || head_dim == 128, "codebook head_dim");
  CHECK(n_tiles >= 0 && n_tiles < 65536, "codebook tiles");
  if (n_tiles == 0) return;
  auto* workspaces = reinterpret_cast<Workspace*>(workspace);
  if (head_dim == 64) {
    launch_match<64>(context, tiles, n_tiles, workspaces);
  } else {
    launch_match<128>(context, tiles, n_tiles, workspaces);
  }
}

}  // namespace spindle::kernels
