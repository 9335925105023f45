#pragma once
// The stream of a fed team's data: one warp has the copy engine bring the stages of the others,
// each of whose lanes it spends on one of them. A stage in shared memory has two barriers, for
// being full and for being empty again, and a description beside it. Compute capability 9.0.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/decode_pipe.cuh"
#include "kernels/cuda/mbarrier.cuh"

namespace spindle::kernels::device {

// What goes with the stages of one computing warp.
template <typename C>
struct alignas(16) WarpStages {
  Stage stages[C::kStages];
  std::uint64_t full[C::kStages];
  std::uint64_t empty[C::kStages];
};
template <typename C>
struct FeedShared {
  WarpStages<C> warps[C::kWarps];
  alignas(16) DecodeEntry entry;  // of the segment that the feeding warp is at
};

// Which stage comes next. Barriers have the parity of the number of its uses.
template <typename C>
struct FeedPlace {
  std::uint32_t count = 0;

  static_assert(C::kStages == 2);
  __device__ std::uint32_t slot() const { return count % 2; }
  __device__ std::uint32_t parity() const { return count / 2 % 2; }
};

template <typename C>
__device__ void init_feed(FeedShared<C>& feed) {
  const int warp = static_cast<int>(threadIdx.x) % C::kTeamThreads;
  if (warp >= C::kWarps) return;
  for (int i = 0; i < C::kStages; ++i) {
    barrier_init(shared_address(&feed.warps[warp].full[i]), 1);
    barrier_init(shared_address(&feed.warps[warp].empty[i]), 32);
  }
  fence_barrier_init();
}

// The feeding side: lane i has the units of warp i of one segment after the other.
template <typename C>
class Feeder {
 public:
  static constexpr int kDim = C::kDim;

  __device__ Feeder(FeedShared<C>& feed, std::byte* ring, const DecodeCall& call)
      : lane_(static_cast<int>(threadIdx.x) % 32), call_(&call) {
    const int warp = lane_ < C::kWarps ? lane_ : 0;
    warp_ = &feed.warps[warp];
    ring_ = shared_address(ring + warp * C::kStages * C::kStageBytes);
  }

  // Units first, first + step .. below `end` of the entry.
  __device__ void run(const DecodeEntry& entry, int first, int end) {
    const bool feeds = lane_ < C::kWarps;
    unit_ = first + lane_;
    end_ = end;
    stage_ = 0;
    bool over = !feeds;
    if (feeds) {
      next_ = fetch(entry, unit_);
      begin_unit(entry);
    }
    for (int idle = 0; __any_sync(kAllLanes, !over);) {
      bool fed = false;
      // Of a barrier that was never arrived at, the phase before the first is over.
      if (!over &&
          barrier_has_passed(shared_address(&warp_->empty[place_.slot()]), place_.parity() ^ 1U)) {
        over = unit_ >= end_;
        over ? put_over() : put_stage(entry);
        ++place_.count;
        fed = true;
      }
      if (__any_sync(kAllLanes, fed)) {
        idle = 0;
      } else {
        if (++idle == 1 << 26) __trap();  // the others are dead
        __nanosleep(100);
      }
    }
  }

 private:
  __device__ const std::byte* at(std::uint32_t place) const { return place_of(*call_, place); }

  // The block of a unit, or a page as a block.
  __device__ DeviceKvBlock fetch(const DecodeEntry& entry, int unit) const {
    DeviceKvBlock block;
    if (unit >= end_) return block;
    const DeviceKvHead& head = entry.head;
    if (unit < head.n_blocks) {
      const auto* from = reinterpret_cast<const uint2*>(head.blocks + unit);
      auto* to = reinterpret_cast<uint2*>(&block);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = __ldg(from + i);
      return block;
    }
    const int index = unit - head.n_blocks + first_tail_page(entry);
    const int begin = head.tail_origin + index * kKvBlockTokens;
    block.k_codes =
        static_cast<std::uint32_t>(__ldg(head.pages + index) * (call_->page_bytes / kKvPlaceBytes));
    block.v_codes = block.k_codes + 64 * kDim / kKvPlaceBytes;
    block.first = static_cast<std::uint8_t>(max(0, head.tail_first - begin));
    block.end = static_cast<std::uint8_t>(min(kKvBlockTokens, entry.n_context - begin));
    return block;
  }
  // The descriptor after the next is on its way while a unit is fed.
  __device__ void begin_unit(const DecodeEntry& entry) {
    block_ = next_;
    next_ = fetch(entry, unit_ + C::kWarps);
  }

  __device__ void put_over() {
    warp_->stages[place_.slot()].bits = Stage::kOver;
    barrier_arrive(shared_address(&warp_->full[place_.slot()]));
  }

  __device__ void put_stage(const DecodeEntry& entry) {
    const bool k_elements = is_elements(block_.k_format);
    const bool v_elements = is_elements(block_.v_format);
    const int k_parts = k_elements ? kDim / 64 : 1;
    const int v_parts = v_elements ? kDim / 64 : 1;
    const bool is_key = stage_ < k_parts;
    // Coded sides come together.
    const bool is_both = !k_elements && !v_elements;
    const KvFormat format = is_key ? block_.k_format : block_.v_format;
    const int part = is_key ? stage_ : stage_ - k_parts;
    Stage stage;
    stage.codes = is_key ? block_.k_codes : block_.v_codes;
    stage.scales = 0;
    stage.first_position = block_.first_position;
    stage.bits = Stage::pack_bits(format, is_key, part, stage_ == k_parts - 1, block_.first,
                                  block_.end, block_.capacity, block_.positions != kNoPlace,
                                  is_both ? static_cast<int>(block_.v_format) : 0);
    *reinterpret_cast<uint4*>(&warp_->stages[place_.slot()]) =
        *reinterpret_cast<const uint4*>(&stage);

    const std::uint32_t full = shared_address(&warp_->full[place_.slot()]);
    const std::uint32_t to = ring_ + place_.slot() * C::kStageBytes;
    if (!(is_key ? k_elements : v_elements)) {
      put_codes(entry, is_key, is_both, to, full);
    } else if (block_.capacity == kKvBlockTokens) {
      barrier_expect(full, kElementBytes);
      copy_bulk(to, at(stage.codes) + part * kElementBytes, kElementBytes, full);
    } else {
      barrier_arrive(full);  // the warp copies such blocks itself
    }
    if (is_both || ++stage_ == k_parts + v_parts) {
      stage_ = 0;
      unit_ += C::kWarps;
      begin_unit(entry);
    }
  }

  __device__ void put_codes(const DecodeEntry& entry, bool has_key, bool has_both, std::uint32_t to,
                            std::uint32_t full) {
    const bool has_value = !has_key || has_both;
    const int k_codes = has_key ? 4 * kDim * bits_of(block_.k_format) : 0;
    const int k_scales = has_key ? scale_bytes<kDim>(block_.k_format) : 0;
    const int v_codes = has_value ? 4 * kDim * bits_of(block_.v_format) : 0;
    const int v_scales = has_value ? scale_bytes<kDim>(block_.v_format) : 0;
    const bool has_rope = C::kBeforeRope && has_key && is_before_rope(block_.k_format);
    const bool has_base =
        has_rope && block_.first_position >= 0 && block_.first_position < call_->max_positions;
    int list = 0;
    if (has_rope && block_.positions != kNoPlace) list = entry.head.wide_positions != 0 ? 128 : 64;
    barrier_expect(full,
                   k_codes + k_scales + v_codes + v_scales + (has_base ? 4 * kDim : 0) + list);
    if (has_key) {
      copy_bulk(to, at(block_.k_codes), k_codes, full);
      copy_bulk(to + k_codes, at(block_.k_scales), k_scales, full);
    }
    if (has_base) {
      const std::int64_t row = std::int64_t{block_.first_position} * (kDim / 2);
      copy_bulk(to + C::kRopeOffset, call_->rope_cos + row, 2 * kDim, full);
      copy_bulk(to + C::kRopeOffset + 2 * kDim, call_->rope_sin + row, 2 * kDim, full);
    }
    if (list != 0) copy_bulk(to + C::kRopeOffset + 4 * kDim, at(block_.positions), list, full);
    if (has_value) {
      if (has_both) to += C::kValueOffset;
      copy_bulk(to, at(block_.v_codes), v_codes, full);
      copy_bulk(to + v_codes, at(block_.v_scales), v_scales, full);
    }
  }

  int lane_;
  const DecodeCall* call_;
  WarpStages<C>* warp_;
  std::uint32_t ring_;
  FeedPlace<C> place_;
  int unit_ = 0;
  int end_ = 0;
  int stage_ = 0;        // of the unit
  DeviceKvBlock block_;  // of the unit
  DeviceKvBlock next_;   // of the next one
};

// The computing side of a warp.
template <typename C>
class Feed {
 public:
  __device__ Feed(FeedShared<C>& feed, int warp)
      : warp_(shared_address(&feed.warps[warp < C::kWarps ? warp : 0])) {}

  __device__ std::uint32_t slot() const { return place_.slot(); }
  // Waits for the next stage.
  __device__ Stage wait() const {
    barrier_wait(warp_ + offsetof(WarpStages<C>, full) + 8 * slot(), place_.parity());
    __syncwarp();
    const uint4 x = load_shared(warp_ + 16 * slot());
    return {x.x, x.y, static_cast<std::int32_t>(x.z), x.w};
  }
  // The lane has read the stage.
  __device__ void release() {
    barrier_arrive(warp_ + offsetof(WarpStages<C>, empty) + 8 * slot());
    ++place_.count;
  }

 private:
  std::uint32_t warp_;
  FeedPlace<C> place_;
};

}  // namespace spindle::kernels::device
