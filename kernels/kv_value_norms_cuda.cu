// ||W_O,h v_t||_1 of every cached token and query head: by far the most arithmetic of a boundary
// (2 hidden n_heads head_dim flops a token), so it runs on tensor cores at the rate of a product.
//
// W_O is first laid out as images of shared-memory tiles, [query head][tile of 128 outputs],
// swizzled and in the type of the pages; then every block keeps the values of 256 tokens in
// registers (A), streams the tiles of its kv head's query heads (B), and adds the absolute values
// of each product to one sum a token. The products themselves are never stored.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/cuda/kv_score_device.cuh"
#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/prefill_wgmma.cuh"
#include "kernels/cuda/value_norms.h"

namespace spindle::kernels {
namespace {

using device::shared_address;
using score::kUnitTokens;
using score::Layer;

constexpr int kTileOutputs = 128;
constexpr int kBlockTokens = 256;
// Few tokens leave blocks too few for the device: then outputs are split, and a sum of parts is
// made.
constexpr int kMaxSplits = 8;
constexpr std::int64_t kMaxSplitBlocks = 512;
// What a block costs before its first tile, in tiles.
constexpr std::int64_t kBlockCostTiles = 2;
constexpr int kRingBytes = 192 * 1024;
constexpr int kMmaThreads = 256;
constexpr int kMmaStages = 3;
// Two warpgroups that multiply and one that fetches and gives its registers to them.
constexpr int kWgmmaConsumers = 256;
constexpr int kWgmmaThreads = kWgmmaConsumers + 128;

SPINDLE_HOST_DEVICE constexpr int tile_bytes(int head_dim) { return kTileOutputs * head_dim * 2; }

// ---- The images of W_O's tiles: for every 64 channels [128 outputs][8 chunks of 16 bytes], where
// chunk c of output r is at c ^ (r % 8): the 128-byte swizzle of wgmma, and free of bank conflicts
// for ldmatrix.

template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(256)
    lay_out_tiles(const Bf16* output, std::int64_t hidden, int n_heads, int n_tiles, uint4* tiles) {
  constexpr int kChunks = kHeadDim / 8;  // of an output in a tile
  let_next_kernel_start();
  const std::int64_t index = blockIdx.x * std::int64_t{256} + threadIdx.x;
  const int chunk = static_cast<int>(index % kChunks);
  const int row = static_cast<int>(index / kChunks % kTileOutputs);
  const std::int64_t tile = index / (kChunks * kTileOutputs);
  if (tile >= static_cast<std::int64_t>(n_heads) * n_tiles) {
    wait_for_previous_kernel();
    return;
  }
  const std::int64_t head = tile / n_tiles;
  const std::int64_t out = tile % n_tiles * kTileOutputs + row;
  uint4 words = make_uint4(0, 0, 0, 0);
  if (out < hidden) {
    words = *reinterpret_cast<const uint4*>(output + (out * n_heads + head) * kHeadDim + 8 * chunk);
  }
  if constexpr (!kBf16) {
    std::uint32_t* word = &words.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word[i]));
      const __half2 half = __floats2half2_rn(fminf(fmaxf(pair.x, -65504.0F), 65504.0F),
                                             fminf(fmaxf(pair.y, -65504.0F), 65504.0F));
      word[i] = reinterpret_cast<const std::uint32_t&>(half);
    }
  }
  wait_for_previous_kernel();  // which may read the tiles of the layer before
  tiles[tile * (kChunks * kTileOutputs) + (chunk / 8 * kTileOutputs + row) * 8 +
        (chunk % 8 ^ row % 8)] = words;
}

// ---- A: the values of 16 tokens as rows of an m16k16 (or m64k16) operand.

// Channel pairs of token `row` for lane (g, q): pair[s][0] the channels 16 s + 2 q, + 1, pair[s][1]
// those 8 higher. Zeros past n.
template <int kHeadDim>
__device__ void load_values(const Layer& layer, const DeviceKvHead& head, int first, int n,
                            int token, int half, std::uint32_t (&a)[kHeadDim / 16][4]) {
  const int lane = threadIdx.x % 32;
  if (token >= n) {
#pragma unroll
    for (int s = 0; s < kHeadDim / 16; ++s) a[s][half] = a[s][2 + half] = 0;
    return;
  }
  const int at = first + token - head.tail_origin;
  const auto* page = reinterpret_cast<const std::uint16_t*>(
      layer.pool + head.pages[at / kUnitTokens] * layer.page_bytes);
  // V follows K.
  const std::uint16_t* values =
      page + kHeadDim * kUnitTokens + at % kUnitTokens + 2 * (lane % 4) * kUnitTokens;
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const std::uint16_t* at_pair = values + (16 * s + 8 * upper) * kUnitTokens;
      a[s][2 * upper + half] = at_pair[0] | static_cast<std::uint32_t>(at_pair[kUnitTokens]) << 16;
    }
  }
}

struct Product {
  const std::byte* tiles;
  std::int32_t tiles_per_head;  // kv head
  std::int32_t first;           // position of token 0
  std::int32_t n;               // tokens
  float* sums;                  // [splits][kv heads][stride]
  std::int64_t stride;
};

// Grid: blocks of tokens, kv heads, splits of the kv head's tiles.
struct Range {
  const std::byte* tiles;
  int count;
};
template <int kHeadDim>
__device__ Range range_of(const Product& product) {
  const int per_split = (product.tiles_per_head + gridDim.z - 1) / gridDim.z;
  const int begin = min(static_cast<int>(blockIdx.z) * per_split, product.tiles_per_head);
  const int end = min(begin + per_split, product.tiles_per_head);
  return {product.tiles + (static_cast<std::int64_t>(blockIdx.y) * product.tiles_per_head + begin) *
                              tile_bytes(kHeadDim),
          end - begin};
}

// The four lanes of a row hold parts of its sum.
__device__ inline void store_sum(const Product& product, int token, float sum) {
  sum += __shfl_xor_sync(0xffffffffU, sum, 1);
  sum += __shfl_xor_sync(0xffffffffU, sum, 2);
  if (threadIdx.x % 4 == 0 && token < product.n) {
    product.sums[(static_cast<std::int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * product.stride +
                 token] = sum;
  }
}

// ---- mma: 8 warps of 32 tokens, tiles by cp.async.

template <int kHeadDim>
__device__ void fetch_tile(const std::byte* tile, std::byte* stage) {
  const std::uint32_t target = shared_address(stage);
#pragma unroll
  for (int i = 0; i < tile_bytes(kHeadDim) / (16 * kMmaThreads); ++i) {
    const int at = (i * kMmaThreads + static_cast<int>(threadIdx.x)) * 16;
    device::copy_16(target + at, tile + at);
  }
}

template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kMmaThreads, 1)
    norms_mma(const Layer layer, const Product product) {
  constexpr int kSteps = kHeadDim / 16;
  constexpr int kTile = tile_bytes(kHeadDim);
  extern __shared__ __align__(1024) std::byte ring[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const DeviceKvHead& head = layer.head(blockIdx.y);
  const Range range = range_of<kHeadDim>(product);
  const int lane = threadIdx.x % 32;
  const int first_token = blockIdx.x * kBlockTokens + threadIdx.x / 32 * 32;
#pragma unroll
  for (int i = 0; i < kMmaStages - 1; ++i) {
    if (i < range.count) fetch_tile<kHeadDim>(range.tiles + i * kTile, ring + i * kTile);
    device::commit_copies();
  }
  std::uint32_t a[2][kSteps][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_values<kHeadDim>(layer, head, product.first, product.n,
                            first_token + 16 * m + 8 * half + lane / 4, half, a[m]);
    }
  }
  float sum[2][2] = {};
  for (int tile = 0; tile < range.count; ++tile) {
    device::wait_copies<kMmaStages - 2>();
    __syncthreads();
    const int next = tile + kMmaStages - 1;
    if (next < range.count) {
      fetch_tile<kHeadDim>(range.tiles + static_cast<std::int64_t>(next) * kTile,
                           ring + next % kMmaStages * kTile);
    }
    device::commit_copies();
    // Lane i gives ldmatrix the row i % 8 of matrix i / 8: the 16-byte chunks of two steps.
    const std::uint32_t stage = shared_address(ring + tile % kMmaStages * kTile) + lane % 8 * 128;
#pragma unroll 1
    for (int columns = 0; columns < kTileOutputs; columns += 32) {
      float c[2][4][4] = {};
#pragma unroll
      for (int pair = 0; pair < kSteps / 2; ++pair) {
        const int chunk = 4 * pair + lane / 8;
        const std::uint32_t at =
            stage + chunk / 8 * (kTileOutputs * 128) + ((chunk % 8 ^ lane % 8) << 4);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          std::uint32_t b[4];
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                       : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                       : "r"(at + (columns + 8 * n) * 128));
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const std::uint32_t(&first)[4] = a[m][2 * pair];
            const std::uint32_t(&second)[4] = a[m][2 * pair + 1];
            device::mma<kBf16>(c[m][n], first[0], first[1], first[2], first[3], b[0], b[1]);
            device::mma<kBf16>(c[m][n], second[0], second[1], second[2], second[3], b[2], b[3]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          sum[m][0] += fabsf(c[m][n][0]) + fabsf(c[m][n][1]);
          sum[m][1] += fabsf(c[m][n][2]) + fabsf(c[m][n][3]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_sum(product, first_token + 16 * m + 8 * half + lane / 4, sum[m][half]);
    }
  }
}

// ---- wgmma: two warpgroups of 2 x 64 tokens, tiles by bulk copies. While a warpgroup's second
// product runs, or the other warpgroup's, the absolute values of the first are added up.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Starts the product of one 64-token operand with a tile.
template <int kHeadDim, bool kBf16>
__device__ inline void start_product(float (&d)[64], const std::uint32_t (&a)[kHeadDim / 16][4],
                                     std::uint32_t tile) {
  // Rows of 128 bytes in groups of 8 (1024 bytes apart), 128-byte swizzle.
  constexpr std::uint64_t kLayout =
      std::uint64_t{1} << 62 | std::uint64_t{1024 / 16} << 32 | std::uint64_t{1} << 16;
  using Element = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  prefill::pin(d);
  prefill::wgmma_fence();
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    const std::uint32_t at = tile + s / 4 * (kTileOutputs * 128) + s % 4 * 32;
    prefill::wgmma<Element>(d, a[s], kLayout | ((at & 0x3ffffU) >> 4), s > 0 ? 1 : 0);
  }
  prefill::wgmma_commit();
}

// Waits until all but the newest kPending products are done, d's among them.
template <int kPending>
__device__ inline void wait_products(float (&d)[64]) {
  prefill::wgmma_wait<kPending>();
  prefill::pin(d);
}

__device__ inline void add_up(const float (&d)[64], float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    sum[0] += fabsf(d[i]);
    sum[1] += fabsf(d[i + 2]);
    sum[0] += fabsf(d[i + 1]);
    sum[1] += fabsf(d[i + 3]);
  }
}
#endif

template <int kHeadDim, bool kBf16>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    norms_wgmma(const Layer layer, const Product product) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kSteps = kHeadDim / 16;
  constexpr int kTile = tile_bytes(kHeadDim);
  constexpr int kStages = kRingBytes / kTile;
  extern __shared__ __align__(1024) std::byte ring[];
  __shared__ std::uint64_t full[kStages];
  __shared__ std::uint64_t empty[kStages];
  const Range range = range_of<kHeadDim>(product);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      prefill::barrier_init(shared_address(&full[i]), 1);
      prefill::barrier_init(shared_address(&empty[i]), kWgmmaConsumers / 128);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  // The same for a whole warp, as the compiler must see.
  const int warpgroup = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);
  if (warpgroup == kWgmmaConsumers / 128) {
    prefill::registers_down<24>();
    if (threadIdx.x == kWgmmaConsumers) {
      for (int tile = 0; tile < range.count; ++tile) {
        const int stage = tile % kStages;
        if (tile >= kStages) {
          prefill::barrier_wait(shared_address(&empty[stage]), (tile / kStages - 1) & 1);
        }
        const std::uint32_t barrier = shared_address(&full[stage]);
        prefill::barrier_expect(barrier, kTile);
        device::copy_bulk(shared_address(ring + stage * kTile),
                          range.tiles + static_cast<std::int64_t>(tile) * kTile, kTile, barrier);
      }
    }
  } else {
    prefill::registers_up<240>();
    const DeviceKvHead& head = layer.head(blockIdx.y);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    // Rows 16 (warp % 4) + g, + 8 of the two operands of 64 tokens.
    const int first_token = blockIdx.x * kBlockTokens + warp / 4 * 128 + warp % 4 * 16 + lane / 4;
    std::uint32_t a[2][kSteps][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_values<kHeadDim>(layer, head, product.first, product.n,
                              first_token + 64 * m + 8 * half, half, a[m]);
      }
    }
    float sum[2][2] = {};
    float d0[64];
    float d1[64];
    const std::uint32_t ring_address = shared_address(ring);
    for (int tile = 0; tile < range.count; ++tile) {
      const int stage = tile % kStages;
      prefill::barrier_wait(shared_address(&full[stage]), (tile / kStages) & 1);
      start_product<kHeadDim, kBf16>(d0, a[0], ring_address + stage * kTile);
      start_product<kHeadDim, kBf16>(d1, a[1], ring_address + stage * kTile);
      wait_products<1>(d0);
      add_up(d0, sum[0]);
      wait_products<0>(d1);
      if (threadIdx.x % 128 == 0) {
        prefill::barrier_arrive(shared_address(&empty[stage]));
      }
      add_up(d1, sum[1]);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_sum(product, first_token + 64 * m + 8 * half, sum[m][half]);
      }
    }
  }
#endif
}

// Adds the splits up and divides by the sum over the kv heads. The mean over the group would divide
// all of them by the same number.
__global__ void __launch_bounds__(256)
    normalize_sums(const float* sums, std::int64_t stride, int n_splits, int n_heads, int n,
                   Rows norms) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int t = blockIdx.x * 256 + threadIdx.x;
  if (t >= n) return;
  float total = 0.0F;
  for (int h = 0; h < n_heads; ++h) {
    float sum = 0.0F;
    for (int s = 0; s < n_splits; ++s) {
      sum += sums[(static_cast<std::int64_t>(s) * n_heads + h) * stride + t];
    }
    norms.data[h * norms.stride + t] = sum;
    total += sum;
  }
  for (int h = 0; h < n_heads; ++h) {
    float& norm = norms.data[h * norms.stride + t];
    norm = total > 0.0F ? norm / total : 0.0F;
  }
}

std::int64_t tiles_per_query_head(std::int64_t hidden) {
  return (hidden + kTileOutputs - 1) / kTileOutputs;
}

// The number of splits that takes the least time in waves of one block a multiprocessor.
int splits_for(std::int64_t n_blocks, std::int64_t n_tiles, std::int64_t n_multiprocessors) {
  int best = 1;
  std::int64_t least = 0;
  for (int splits = 1; splits <= kMaxSplits && splits <= n_tiles; ++splits) {
    if (splits > 1 && n_blocks * splits > kMaxSplitBlocks) break;
    const std::int64_t waves = (n_blocks * splits + n_multiprocessors - 1) / n_multiprocessors;
    const std::int64_t cost = waves * ((n_tiles + splits - 1) / splits + kBlockCostTiles);
    if (splits == 1 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

template <int kHeadDim, bool kBf16>
void launch_norms(const CudaContext& context, const Layer& layer, const Bf16* output,
                  std::int64_t hidden, std::int64_t first, std::byte* workspace, bool wgmma,
                  Rows norms) {
  const auto n = static_cast<std::int32_t>(layer.n_tokens - first);
  const std::int64_t n_tiles = tiles_per_query_head(hidden);
  const std::int64_t n_chunks = layer.n_heads * n_tiles * (tile_bytes(kHeadDim) / 16);
  launch_chained(context, "lay_out_tiles", lay_out_tiles<kHeadDim, kBf16>,
                 static_cast<unsigned>((n_chunks + 255) / 256), 256, 0, output, hidden,
                 layer.n_heads, static_cast<int>(n_tiles), reinterpret_cast<uint4*>(workspace));

  const std::int64_t n_blocks = (n + kBlockTokens - 1) / kBlockTokens;
  const int n_splits =
      splits_for(n_blocks * layer.n_kv_heads, layer.group * n_tiles, context.n_multiprocessors());
  Product product{};
  product.tiles = workspace;
  product.tiles_per_head = static_cast<std::int32_t>(layer.group * n_tiles);
  product.first = static_cast<std::int32_t>(first);
  product.n = n;
  if (n_splits == 1) {
    product.sums = norms.data;
    product.stride = norms.stride;
  } else {
    product.sums = reinterpret_cast<float*>(workspace + 16 * n_chunks);
    product.stride = n;
  }
  const dim3 grid(static_cast<unsigned>(n_blocks), static_cast<unsigned>(layer.n_kv_heads),
                  static_cast<unsigned>(n_splits));
  if (wgmma) {
    cuda_check(cudaFuncSetAttribute(norms_wgmma<kHeadDim, kBf16>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes));
    launch_chained(context, "norms_wgmma", norms_wgmma<kHeadDim, kBf16>, grid, kWgmmaThreads,
                   kRingBytes, layer, product);
  } else {
    constexpr int kBytes = kMmaStages * tile_bytes(kHeadDim);
    cuda_check(cudaFuncSetAttribute(norms_mma<kHeadDim, kBf16>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    launch_chained(context, "norms_mma", norms_mma<kHeadDim, kBf16>, grid, kMmaThreads, kBytes,
                   layer, product);
  }
  launch_chained(context, "normalize_sums", normalize_sums, static_cast<unsigned>((n + 255) / 256),
                 256, 0, product.sums, product.stride, n_splits, layer.n_kv_heads, n, norms);
}

}  // namespace

std::size_t value_output_norms_workspace_bytes(const AttentionShape& shape, std::int64_t hidden) {
  const auto tiles = static_cast<std::size_t>(shape.n_heads * tiles_per_query_head(hidden));
  return tiles * static_cast<std::size_t>(tile_bytes(shape.head_dim)) +
         kMaxSplitBlocks * kBlockTokens * sizeof(float);
}

void value_output_norms(const CudaContext& context, const DeviceScoreLayer& given,
                        const Bf16* output, std::int64_t hidden, std::int64_t first,
                        std::byte* workspace, std::size_t workspace_bytes, ValueNormsPath path,
                        Rows norms) {
  const Layer layer = score::layer_of(given);
  CHECK(hidden > 0 && output != nullptr, "value_output_norms projection");
  CHECK(workspace_bytes >= value_output_norms_workspace_bytes(given.shape, hidden),
        "value_output_norms workspace");
  for (const std::int64_t tail_first : given.tail_first) {
    CHECK(first >= tail_first, "value_output_norms reads tails");
  }
  if (first == given.n_tokens) return;
  CHECK(first < given.n_tokens && norms.n_rows == layer.n_kv_heads &&
            norms.stride >= given.n_tokens - first,
        "value_output_norms rows");
  const bool wgmma = path == ValueNormsPath::kBest && context.compute_capability() == 90;
  const bool bf16 = given.pool.layout.dtype == DType::kBF16;
  if (given.shape.head_dim == 128) {
    bf16 ? launch_norms<128, true>(context, layer, output, hidden, first, workspace, wgmma, norms)
         : launch_norms<128, false>(context, layer, output, hidden, first, workspace, wgmma, norms);
  } else {
    bf16 ? launch_norms<64, true>(context, layer, output, hidden, first, workspace, wgmma, norms)
         : launch_norms<64, false>(context, layer, output, hidden, first, workspace, wgmma, norms);
  }
}

void value_output_norms(const CudaContext& context, const DeviceScoreLayer& layer,
                        const DeviceLinear& output, std::int64_t first, std::byte* workspace,
                        std::size_t workspace_bytes, Rows norms) {
  CHECK(output.n_in() == std::int64_t{layer.shape.n_heads} * layer.shape.head_dim,
        "value_output_norms projection");
  value_output_norms(context, layer, output.data(), output.n_out(), first, workspace,
                     workspace_bytes, ValueNormsPath::kBest, norms);
}

}  // namespace spindle::kernels
