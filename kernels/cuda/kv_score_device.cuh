#pragma once
// What the kernels of kv_score.h share: a DeviceScoreLayer as they get it, units of 32 cached
// tokens and how their slots are numbered, reductions.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/core/check.h"
#include "kernels/kv_score.h"

namespace spindle::kernels::score {

inline constexpr int kUnitTokens = 32;

// By value, so that kernels need no table of their own.
struct Layer {
  const DeviceSequence* sequence;
  const std::byte* pool;
  const std::byte* expanded;
  const std::int64_t* first_page;
  const F16* q;
  std::int64_t page_bytes;
  std::int32_t layer;
  std::int32_t n_heads;
  std::int32_t n_kv_heads;
  std::int32_t group;
  std::int32_t n_queries;
  std::int32_t n_tokens;
  std::int32_t n_slots[kMaxScoreKvHeads];

  __device__ const DeviceKvHead& head(int kv_head) const {
    return sequence->heads[static_cast<std::int64_t>(layer) * n_kv_heads + kv_head];
  }
};

inline Layer layer_of(const DeviceScoreLayer& layer) {
  const AttentionShape& shape = layer.shape;
  CHECK(shape.n_kv_heads > 0 && shape.n_kv_heads <= kMaxScoreKvHeads && shape.n_heads > 0 &&
            shape.n_heads % shape.n_kv_heads == 0 &&
            (shape.head_dim == 64 || shape.head_dim == 128),
        "shape of scores");
  CHECK(layer.pool.layout.head_dim == shape.head_dim &&
            layer.pool.layout.page_tokens == kKvPageTokens &&
            layer.pool.layout.dtype != DType::kF32,
        "pages of scores");
  const auto n_kv_heads = static_cast<std::size_t>(shape.n_kv_heads);
  CHECK(layer.n_slots.size() == n_kv_heads && layer.tail_first.size() == n_kv_heads &&
            layer.n_tokens > 0 && layer.n_tokens < (std::int64_t{1} << 30) &&
            layer.n_queries >= 0 && layer.n_queries <= kMaxScoreQueries,
        "tokens of scores");
  Layer view{};
  view.sequence = layer.sequence;
  view.pool = layer.pool.base;
  view.expanded = layer.expanded.pages;
  view.first_page = layer.expanded.first_page;
  view.q = layer.q;
  view.page_bytes = static_cast<std::int64_t>(layer.pool.page_bytes());
  view.layer = layer.layer;
  view.n_heads = shape.n_heads;
  view.n_kv_heads = shape.n_kv_heads;
  view.group = shape.n_heads / shape.n_kv_heads;
  view.n_queries = layer.n_queries;
  view.n_tokens = static_cast<std::int32_t>(layer.n_tokens);
  for (std::size_t h = 0; h < n_kv_heads; ++h) {
    const std::int64_t tail = layer.n_tokens - layer.tail_first[h];
    CHECK(tail >= layer.n_queries && layer.n_slots[h] >= tail &&
              (layer.n_slots[h] == tail || layer.expanded.pages != nullptr),
          "slots of a head");
    view.n_slots[h] = static_cast<std::int32_t>(layer.n_slots[h]);
  }
  return view;
}

inline std::int64_t largest(std::span<const std::int64_t> n_slots) {
  std::int64_t most = 0;
  for (const std::int64_t n : n_slots) most = n > most ? n : most;
  return most;
}

// The units of a head: its blocks, then the pages of its tail from the first visible one on.
struct Units {
  std::int32_t n_blocks;
  std::int32_t n_units;
  std::int32_t first_tail_page;
};

__device__ inline Units units_of(const DeviceKvHead& head, int n_tokens) {
  Units units;
  units.n_blocks = head.n_blocks;
  units.first_tail_page = (head.tail_first - head.tail_origin) / kUnitTokens;
  const int end = (n_tokens - head.tail_origin + kUnitTokens - 1) / kUnitTokens;
  units.n_units = head.n_blocks + end - units.first_tail_page;
  return units;
}

struct Unit {
  const std::byte* page;
  std::int32_t begin;  // tokens [begin, end) are visible
  std::int32_t end;
  std::int32_t position;  // of token 0; far below every query for a block
};

__device__ inline Unit unit_at(const Layer& layer, const DeviceKvHead& head, const Units& units,
                               int kv_head, int index) {
  Unit unit;
  if (index < units.n_blocks) {
    const DeviceKvBlock& block = head.blocks[index];
    unit.page = layer.expanded + (layer.first_page[kv_head] + index) * layer.page_bytes;
    unit.begin = block.first;
    unit.end = block.end;
    unit.position = -(1 << 30);
    return unit;
  }
  const int page = units.first_tail_page + index - units.n_blocks;
  unit.page = layer.pool + head.pages[page] * layer.page_bytes;
  unit.position = head.tail_origin + page * kUnitTokens;
  unit.begin = max(head.tail_first - unit.position, 0);
  unit.end = min(layer.n_tokens - unit.position, kUnitTokens);
  return unit;
}

template <typename T>
__device__ T warp_sum(T value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, distance);
  }
  return value;
}

// Every thread gets the sum. kThreads threads call it; `shared` holds one value a warp.
template <int kThreads, typename T>
__device__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared[warp];
  return sum;
}

}  // namespace spindle::kernels::score
