#pragma once
// How the work of a layer is cut. Every entry (a tile of query heads of one kv head of one
// sequence) is a row of units: its blocks, then the pages of its tail. Units have weights by what
// they cost; the CTAs that are active take equal shares of the line of all weights, and a unit
// belongs to the CTA in whose share it begins. Everyone derives the same cuts from the same few
// numbers.

#include <cstdint>

#include "kernels/cuda/decode_launch.h"

namespace spindle::kernels::device {

inline constexpr std::int32_t kPageWeight = 16;

// Relative cost of a unit of 32 tokens, in sixteenths of a page.
__device__ inline std::int32_t side_weight(KvFormat format) {
  switch (format) {
    case KvFormat::kRaw:
      return 8;
    case KvFormat::kInt4:
      return 3;
    case KvFormat::kKivi4:
    case KvFormat::kKivi2:
      return 4;
    case KvFormat::kCodebook:
    case KvFormat::kToken:
      return 6;
    default:
      return 4;
  }
}

__device__ inline int active_ctas(std::int64_t total, int n_ctas) {
  const std::int64_t wanted = total / kPageWeight;
  return wanted < 1 ? 1 : wanted < n_ctas ? static_cast<int>(wanted) : n_ctas;
}
__device__ inline std::int64_t share_begin(std::int64_t total, int active, int cta) {
  return total * cta / active;
}
// The CTA in whose share the weight `at` lies.
__device__ inline int cta_of(std::int64_t total, int active, std::int64_t at) {
  int cta = static_cast<int>(at * active / total);
  while (cta > 0 && share_begin(total, active, cta) > at) --cta;
  while (cta + 1 < active && share_begin(total, active, cta + 1) <= at) ++cta;
  return cta;
}

__device__ inline int first_tail_page(const DecodeEntry& entry) {
  return (entry.head.tail_first - entry.head.tail_origin) / kKvBlockTokens;
}
__device__ inline int n_tail_pages(const DecodeEntry& entry) {
  const int end = (entry.n_context - entry.head.tail_origin + kKvBlockTokens - 1) / kKvBlockTokens;
  return end - first_tail_page(entry);
}
// The first unit that begins at or behind weight `at` of the entry.
__device__ inline int unit_at(const DecodeEntry& entry, std::int64_t at) {
  const auto weight = static_cast<std::uint32_t>(at);
  const auto block = static_cast<std::uint32_t>(entry.block_weight);
  const std::uint32_t body = static_cast<std::uint32_t>(entry.head.n_blocks) * block;
  if (weight > body) {
    return entry.head.n_blocks + static_cast<int>((weight - body + kPageWeight - 1) / kPageWeight);
  }
  return block == 0 ? 0 : static_cast<int>((weight + block - 1) / block);
}

inline constexpr int kPlanThreads = 512;

__device__ inline std::int64_t inclusive_scan(std::int64_t value, std::int64_t* warp_sums) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const std::int64_t below = __shfl_up_sync(0xffffffffU, value, step);
    if (lane >= step) value += below;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = value;
  __syncthreads();
  for (int i = 0; i < warp; ++i) value += warp_sums[i];
  return value;
}

// One CTA a layer.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(DecodePlan plan, const DeviceSequence* sequences, int n_sequences, int n_kv_heads,
                int group) {
  __shared__ std::int64_t warp_sums[kPlanThreads / 32];
  __shared__ std::int64_t carry;
  const int layer = blockIdx.x;
  const int tiles = group > kDecodeTileHeads ? group / kDecodeTileHeads : 1;
  const int n_entries = n_sequences * n_kv_heads * tiles;
  DecodeEntry* entries = plan.entries + std::int64_t{layer} * plan.max_entries;
  if (threadIdx.x == 0) carry = 0;
  __syncthreads();
  for (int first = 0; first < n_entries; first += kPlanThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    DecodeEntry entry;
    std::int64_t weight = 0;
    if (i < n_entries) {
      const int tile = i % tiles;
      const int kv_head = i / tiles % n_kv_heads;
      const DeviceSequence sequence = sequences[i / tiles / n_kv_heads];
      if (sequence.n_queries > 0) {
        entry.head = sequence.heads[std::int64_t{layer} * n_kv_heads + kv_head];
        entry.row = sequence.query_begin;
        entry.n_context = sequence.n_context;
        entry.first_head = kv_head * group + tile * kDecodeTileHeads;
        entry.n_heads = group < kDecodeTileHeads ? group : kDecodeTileHeads;
        if (entry.head.n_blocks > 0) {
          // Bodies are of one format but for their first and last blocks.
          const DeviceKvBlock& block = entry.head.blocks[entry.head.n_blocks / 2];
          entry.block_weight = side_weight(block.k_format) + side_weight(block.v_format);
        }
        weight = std::int64_t{entry.head.n_blocks} * entry.block_weight +
                 std::int64_t{n_tail_pages(entry)} * kPageWeight;
      }
    }
    const std::int64_t end = carry + inclusive_scan(weight, warp_sums);
    if (i < n_entries) {
      entry.begin = end - weight;
      entry.end = end;
      entries[i] = entry;
    }
    __syncthreads();
    if (threadIdx.x == kPlanThreads - 1) carry = end;
    __syncthreads();
  }
  const std::int64_t total = carry;
  std::int64_t* shares = plan.shares + std::int64_t{layer} * (plan.n_ctas + 1);
  const int active = active_ctas(total, plan.n_ctas);
  for (int cta = threadIdx.x; cta <= plan.n_ctas; cta += kPlanThreads) {
    const std::int64_t at = cta < active ? share_begin(total, active, cta) : total;
    shares[cta] = at;
    if (cta >= active || total == 0) continue;
    int low = 0;
    int high = n_entries - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (entries[middle].end > at) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    plan.first_entry[std::int64_t{layer} * plan.n_ctas + cta] = low;
  }
  for (int i = threadIdx.x; i < n_entries; i += kPlanThreads) {
    if (entries[i].begin == entries[i].end) continue;
    entries[i].first_part = cta_of(total, active, entries[i].begin);
    entries[i].last_part = cta_of(total, active, entries[i].end - 1);
  }
}

}  // namespace spindle::kernels::device
