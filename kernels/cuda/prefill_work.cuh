#pragma once
// What the kernels of prefill attention share: how a launch is cut into items, where the slots of a
// kv head lie, and the softmax state of rows that were split over several thread blocks.
//
// Rows: the heads of a group are packed with the queries, row r of a (sequence, kv head) is query
// r / group, head r % group of the group. A tile has tile_rows rows; K and V are read once for
// all of them.
// Slots: the pages of a head in order, its expanded blocks first and then the tail from the first
// page with a visible position on, 32 slots a page. A query sees the visible slots up to its own.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/kv_device.h"

namespace spindle::kernels::prefill {

inline constexpr int kPageSlots = 32;
// Sequences with queries of one launch; more take several launches.
inline constexpr int kMaxLaunchSequences = 384;
inline constexpr int kMaxSplits = 32;
// A split has at least this many slots: less work than that is not worth its partial result.
inline constexpr int kMinSplitSlots = 512;

struct PrefillParams {
  const __half* q = nullptr;
  std::int64_t q_stride = 0;
  __nv_bfloat16* out = nullptr;
  std::int64_t out_stride = 0;
  const DeviceSequence* sequences = nullptr;
  const std::byte* pool = nullptr;
  const std::byte* expanded = nullptr;
  const std::int64_t* expanded_first = nullptr;
  // Results of splits: f32 [item][split][tile_rows][head_dim], and (maximum, mass) of each row.
  float* partial_out = nullptr;
  float2* partial_mass = nullptr;
  int* queue = nullptr;  // of the wgmma kernel, 0 at its start; null: a unit a thread block
  float scale_log2 = 0;  // of scores, log2(e) included
  int layer = 0;
  int n_kv_heads = 0;
  int group = 0;
  int n_splits = 1;
  int tile_rows = 0;
  int n_sequences = 0;
  int n_tiles = 0;  // of all sequences
  // Tiles up to and including a sequence, and its index in `sequences`.
  int tile_end[kMaxLaunchSequences];
  int sequence[kMaxLaunchSequences];
};
static_assert(sizeof(PrefillParams) <= 3840, "kernel parameters are at most 4 KB");

struct PrefillItem {
  int sequence;
  int head;
  int tile;
  int item;  // row of partial results
};

// Tiles of a sequence come longest first.
__device__ inline PrefillItem prefill_item(const PrefillParams& p, int item) {
  const int head = item % p.n_kv_heads;
  const int tile = item / p.n_kv_heads;
  int low = 0;
  int high = p.n_sequences - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (tile < p.tile_end[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {p.sequence[low], head, p.tile_end[low] - 1 - tile, item};
}

// The tokens [low, high) of a page as bits.
__device__ inline std::uint32_t token_bits(int low, int high) {
  const std::uint32_t below_high = high >= 32 ? 0xffffffffU : high <= 0 ? 0U : (1U << high) - 1U;
  const std::uint32_t below_low = low >= 32 ? 0xffffffffU : low <= 0 ? 0U : (1U << low) - 1U;
  return below_high & ~below_low;
}

struct PrefillSlots {
  const std::uint32_t* pages;  // of the tail, from its first visible page on
  const DeviceKvBlock* blocks;
  std::int64_t first_expanded;
  int n_blocks;
  int n_pages;   // blocks and tail
  int tail_low;  // visible slots of the tail, from its first slot on
  int tail_high;

  __device__ std::uint32_t visible(int page) const {
    if (page < n_blocks) return token_bits(blocks[page].first, blocks[page].end);
    const int from = (page - n_blocks) * kPageSlots;
    return token_bits(tail_low - from, tail_high - from);
  }
  // Number of the page in the expanded pages or in the pool.
  __device__ std::int64_t number(int page) const {
    return page < n_blocks ? first_expanded + page : std::int64_t{pages[page - n_blocks]};
  }
};

__device__ inline PrefillSlots prefill_slots(const PrefillParams& p, const DeviceSequence& sequence,
                                             int sequence_index, int head) {
  const DeviceKvHead& kv = sequence.heads[std::int64_t{p.layer} * p.n_kv_heads + head];
  const int hidden = (kv.tail_first - kv.tail_origin) / kPageSlots;
  const int begin = kv.tail_origin + hidden * kPageSlots;
  PrefillSlots slots;
  slots.pages = kv.pages + hidden;
  slots.blocks = kv.blocks;
  slots.n_blocks = kv.n_blocks;
  slots.first_expanded =
      kv.n_blocks > 0 ? p.expanded_first[std::int64_t{sequence_index} * p.n_kv_heads + head] : 0;
  slots.tail_low = kv.tail_first - begin;
  slots.tail_high = sequence.n_context - begin;
  slots.n_pages = kv.n_blocks + (slots.tail_high + kPageSlots - 1) / kPageSlots;
  return slots;
}

// Slot of query j of the sequence.
__device__ inline int query_slot(const DeviceSequence& sequence, const PrefillSlots& slots, int j) {
  return slots.n_blocks * kPageSlots + slots.tail_high - sequence.n_queries + j;
}

struct SplitRange {
  int begin;  // in steps of a kernel's slots
  int end;
  int n_used;  // splits with work; 1: the result is final
};

__device__ inline SplitRange split_range(int n_steps, int step_slots, int split, int n_splits) {
  const int shortest = kMinSplitSlots / step_slots;
  const int even = (n_steps + n_splits - 1) / n_splits;
  const int length = even > shortest ? even : shortest;
  const int begin = split * length;
  return {begin < n_steps ? begin : n_steps, begin + length < n_steps ? begin + length : n_steps,
          (n_steps + length - 1) / length};
}

// Adds up the splits of the items that had more than one with work; `step_slots` as in the kernel
// that wrote them, which comes directly before.
void merge_splits(const CudaContext& context, const PrefillParams& params, int head_dim,
                  int step_slots, int n_items);

// mma.sync, for every supported device.
void launch_prefill_mma(const CudaContext& context, const PrefillParams& params, int head_dim,
                        DType dtype, int n_items);
// wgmma and the tensor copy engine, for compute capability 9.0 only. One thread block fills a
// multiprocessor; with n_blocks of them each works on several items.
void launch_prefill_wgmma(const CudaContext& context, const PrefillParams& params, int head_dim,
                          DType dtype, int n_blocks);

// Slots of one step and rows of a tile of each kernel.
inline constexpr int kMmaStepSlots = 64;
inline constexpr int kMmaRows = 128;
inline constexpr int kWgmmaStepSlots = 128;
// Warpgroups that compute, 64 rows each. Heads of 64 have half the products for the same softmax,
// and fewer registers: three of them hide more of it.
SPINDLE_HOST_DEVICE constexpr int wgmma_groups(int head_dim) { return head_dim == 64 ? 3 : 2; }
SPINDLE_HOST_DEVICE constexpr int wgmma_rows(int head_dim) { return 64 * wgmma_groups(head_dim); }

}  // namespace spindle::kernels::prefill
