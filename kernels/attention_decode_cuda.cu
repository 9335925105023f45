// The plan of decode attention. kernels/cuda/decode_kernel.cuh is the attention itself, compiled
// once per set of formats.

#include <cuda_runtime.h>

#include "kernels/core/cuda_check.h"
#include "kernels/cuda/decode_plan.cuh"

namespace spindle::kernels {
namespace device {
namespace {

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
        weight = kEntryWeight + std::int64_t{entry.head.n_blocks} * entry.block_weight +
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
  const int active = active_teams(total, n_entries, plan.n_teams);
  for (int i = threadIdx.x; i < n_entries; i += kPlanThreads) {
    if (entries[i].begin == entries[i].end) continue;
    entries[i].first_part = team_of(total, active, entries[i].begin);
    entries[i].last_part = team_of(total, active, entries[i].end - 1);
    const std::int64_t share = share_begin(total, active, entries[i].first_part);
    entries[i].first_slot = share < entries[i].begin ? 1 : 0;
  }
  __syncthreads();
  DecodeShare* shares = plan.shares + std::int64_t{layer} * plan.n_teams;
  for (int team = threadIdx.x; team < plan.n_teams; team += kPlanThreads) {
    DecodeShare share;
    if (team < active && total > 0) {
      share.begin = share_begin(total, active, team);
      share.end = share_begin(total, active, team + 1);
      int low = 0;
      int high = n_entries - 1;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (entries[middle].end > share.begin) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      share.entry = low;
      share.first = entries[low];
    }
    shares[team] = share;
  }
}

}  // namespace
}  // namespace device

void launch_plan_decode(CUstream_st* stream, const DecodePlan& plan,
                        const DeviceSequence* sequences, int n_sequences, int n_layers,
                        int n_kv_heads, int group) {
  device::plan_kernel<<<n_layers, device::kPlanThreads, 0, stream>>>(plan, sequences, n_sequences,
                                                                     n_kv_heads, group);
  check_launch("plan_decode");
}

}  // namespace spindle::kernels
