#pragma once
// The stream of a warp's data in the kernel with a table of levels. Like the pipe of
// decode_pipe.cuh a warp copies its own units, asynchronously and two stages ahead, but they are of
// levels or elements alone, and both sides of a block of levels are one stage: less to do for each.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/decode_pipe.cuh"

namespace spindle::kernels::device {

// 64 channels of elements. Apart, since most stages are of levels.
template <int kDim>
__device__ __noinline__ void copy_elements_apart(std::uint32_t to, const std::byte* from,
                                                 Stage stage) {
  copy_elements<kDim>(to, from, stage, Lane());
}

__device__ constexpr KvFormat lloyd_format(int bits) {
  return static_cast<KvFormat>(static_cast<int>(KvFormat::kLloyd1) + bits - 1);
}
// What the stages of complete blocks of levels have in common.
template <int kKeyBits, int kValueBits>
__device__ constexpr std::uint32_t run_bits(bool is_listed) {
  return Stage::pack_bits(lloyd_format(kKeyBits), true, 0, true, 0, kKvBlockTokens, kKvBlockTokens,
                          is_listed, static_cast<int>(lloyd_format(kValueBits)));
}

// What a warp keeps in shared memory for its stream: what it needs once a unit, and registers are
// scarce.
struct alignas(16) StreamRecord {
  static constexpr int kDescriptors = 4;
  DeviceKvBlock descriptors[kDescriptors];  // of the units
  uint2 stages[2];                          // first position and bits
  int end;                                  // of all units
  int end_of_blocks;                        // of those that are blocks
};

template <typename C>
class LevelStream {
 public:
  static constexpr int kDim = C::kDim;
  static_assert(C::kLevelTable && C::kStages == 2);

  // The units first, first + kWarps .. below `end` of the entry, which is in shared memory, as is
  // the record. `record` and `ring`: shared addresses of it and of the stages.
  __device__ LevelStream(const DecodeCall& call, const DecodeEntry& entry, StreamRecord* shared,
                         std::uint32_t record, std::uint32_t ring, int first, int end)
      : call_(&call), entry_(&entry), shared_(shared), record_(record), ring_(ring), unit_(first) {
    if (lane_.index == 0) {
      shared->end = end;
      shared->end_of_blocks = min(end, entry.head.n_blocks);
    }
    __syncwarp();
    request(0);
    request(1);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < C::kStages; ++i) go_on();
  }

  // Waits for the current stage's data.
  __device__ void wait() const {
    wait_copies<1>();
    __syncwarp();
  }
  __device__ const Stage& stage() const { return current_; }
  __device__ std::uint32_t data() const { return ring_ + slot() * C::kStageBytes; }
  // The current stage has been read: the next but one goes where it was, the next is current.
  __device__ void go_on() {
    __syncwarp();
    put(issue(data()));
  }
  // The same faster, when the next but one is a complete block of such levels.
  template <int kKeyBits, int kValueBits, bool kListed>
  __device__ void go_on_run() {
    __syncwarp();
    Stage stage = issue_like<kKeyBits, kValueBits, kListed>(data());
    if (stage.bits == 0) stage = issue(data());
    put(stage);
  }

 private:
  // state_: bytes to the descriptor of the unit that is issued next, then the current stage's slot,
  // then the next part of that unit.
  static constexpr unsigned kDescriptorBytes = sizeof(DeviceKvBlock);
  static constexpr unsigned kSlotBit = StreamRecord::kDescriptors * kDescriptorBytes;
  static constexpr unsigned kPart = 2 * kSlotBit;
  __device__ unsigned slot() const { return state_ / kSlotBit % 2; }
  __device__ int part() const { return static_cast<int>(state_ / kPart); }

  __device__ void put(const Stage& stage) {
    const std::uint32_t stages = record_ + offsetof(StreamRecord, stages);
    if (lane_.index == 0) {
      shared_->stages[slot()] = {static_cast<std::uint32_t>(stage.first_position), stage.bits};
    }
    state_ ^= kSlotBit;
    const uint2 x = load_shared_8(stages + 8 * slot());
    current_.first_position = static_cast<std::int32_t>(x.x);
    current_.bits = x.y;
  }

  __device__ const std::byte* at(std::uint32_t place) const { return place_of(*call_, place); }
  // The lane's piece of 16 bytes of a place.
  __device__ const std::byte* of_lane(std::uint32_t place) const {
    return call_->pool + 16 * lane_.index + std::uint64_t{place} * kKvPlaceBytes;
  }

  __device__ std::uint32_t descriptor(unsigned ahead) const {
    return record_ + (state_ + ahead * kDescriptorBytes) % kSlotBit;
  }
  __device__ void request_block(bool wanted, unsigned ahead) const {
    const auto* from = reinterpret_cast<const std::byte*>(entry_->head.blocks + unit_ +
                                                          static_cast<int>(ahead) * C::kWarps);
    copy_8_if(wanted && lane_.index < 4, descriptor(ahead) + 8 * lane_.index,
              from + 8 * lane_.index);
  }
  // The descriptor of the unit `ahead` units after the next is on its way, or a page number.
  __device__ void request(unsigned ahead) const {
    const int unit = unit_ + static_cast<int>(ahead) * C::kWarps;
    if (unit < shared_->end_of_blocks) {
      request_block(true, ahead);
    } else if (unit < shared_->end && lane_.index == 0) {
      copy_4(descriptor(ahead),
             entry_->head.pages + (unit - entry_->head.n_blocks + first_tail_page(*entry_)));
    }
  }

  // The next stage when it is a complete block of such levels; else nothing, and `bits` of 0.
  template <int kKeyBits, int kValueBits, bool kListed>
  __device__ Stage issue_like(std::uint32_t to) {
    constexpr auto kKey = lloyd_format(kKeyBits);
    constexpr auto kValue = lloyd_format(kValueBits);
    constexpr std::uint32_t kComplete = kKvBlockTokens << 24 | static_cast<std::uint32_t>(kKey) |
                                        static_cast<std::uint32_t>(kValue) << 8;
    const uint4 a = load_shared(descriptor(0));
    const uint4 b = load_shared(descriptor(0) + 16);
    const int end = shared_->end_of_blocks;
    const bool is_like = state_ < kPart && unit_ < end && b.z == kComplete &&
                         (b.w & 0xffU) == kKvBlockTokens && (b.x != kNoPlace) == kListed;
    if (!is_like) return {};
    const bool has_more = unit_ + 2 * C::kWarps < end;
    if (!has_more) request(2);
    request_block(has_more, 2);
    copy_levels<kListed>(to, a, b, true, true, kKeyBits, kValueBits);
    commit_copies();
    go_to_next_unit();
    return {0, 0, static_cast<std::int32_t>(b.y), run_bits<kKeyBits, kValueBits>(kListed)};
  }

  __device__ void go_to_next_unit() {
    unit_ += C::kWarps;
    state_ = (state_ & kSlotBit) | (state_ + kDescriptorBytes) % kSlotBit;
  }

  // The next stage, to `to`; behind the last one nothing.
  __device__ Stage issue(std::uint32_t to) {
    Stage stage = {0, 0, 0, Stage::kOver};
    if (unit_ < shared_->end) {
      if (part() == 0) request(2);
      uint4 a = load_shared(descriptor(0));
      uint4 b = load_shared(descriptor(0) + 16);
      if (unit_ >= shared_->end_of_blocks) page_as_block(a, b, *entry_, *call_, unit_);
      const auto k_format = static_cast<KvFormat>(b.z & 0xff);
      const auto v_format = static_cast<KvFormat>(b.z >> 8 & 0xff);
      const bool k_elements = is_elements(k_format);
      const bool is_both = !k_elements && !is_elements(v_format);
      const int k_parts = k_elements ? kDim / 64 : 1;
      const int v_parts = is_elements(v_format) ? kDim / 64 : 1;
      const bool is_key = part() < k_parts;
      stage.codes = is_key ? a.x : a.z;
      stage.first_position = static_cast<std::int32_t>(b.y);
      stage.bits = Stage::pack_bits(
          is_key ? k_format : v_format, is_key, is_key ? part() : part() - k_parts,
          part() == k_parts - 1, static_cast<int>(b.z >> 16 & 0xff), static_cast<int>(b.z >> 24),
          static_cast<int>(b.w & 0xff), b.x != kNoPlace, is_both ? static_cast<int>(v_format) : 0);
      if (is_elements(stage.format())) {
        copy_elements_apart<kDim>(to, at(stage.codes), stage);
      } else {
        copy_levels<true>(to, a, b, is_key, !is_key || is_both, bits_of(k_format),
                          bits_of(v_format));
      }
      state_ += kPart;
      if (is_both || part() == k_parts + v_parts) go_to_next_unit();
    }
    commit_copies();
    return stage;
  }

  __device__ void copy_codes(bool wanted, std::uint32_t to, std::uint32_t place,
                             int n_bytes) const {
    const std::byte* from = of_lane(place);
    to += 16 * lane_.index;
#pragma unroll
    for (int i = 0; i < 16 * kDim; i += 512) {
      copy_16_if(wanted && i + 16 * lane_.index < n_bytes, to + i, from + i);
    }
  }

  // `a` and `b`: the block's descriptor. Copies without branches, of all that there can be.
  template <bool kListed>
  __device__ void copy_levels(std::uint32_t to, const uint4& a, const uint4& b, bool has_key,
                              bool has_value, int k_bits, int v_bits) const {
    constexpr int kScalePieces = 4;  // of 16 bytes
    const int k_bytes = 4 * kDim * k_bits;
    const int v_bytes = 4 * kDim * v_bits;
    const std::uint32_t v_to = has_key ? to + C::kValueOffset : to;
    copy_codes(has_key, to, a.x, k_bytes);
    copy_codes(has_value, v_to, a.z, v_bytes);
    // The base position's cos and sin.
    const bool has_base = b.y < call_->max_positions;
    copy_16_if(has_key && has_base && lane_.index < kDim / 4,
               to + C::kRopeOffset + 16 * lane_.index,
               (lane_.index < kDim / 8 ? call_->rope_cos : call_->rope_sin) +
                   4 * (lane_.index % (kDim / 8)) + std::int64_t{b.y} * (kDim / 2));
    // Scales of both sides by different lanes.
    const bool of_key = lane_.index < kScalePieces;
    const std::uint32_t shift = of_key ? 0 : kScalePieces * 16;
    copy_16_if(of_key ? has_key : has_value && lane_.index < 2 * kScalePieces,
               (of_key ? to + k_bytes : v_to + v_bytes) - shift + 16 * lane_.index,
               of_lane(of_key ? a.y : a.w) - shift);
    if constexpr (kListed) {
      copy_16_if(
          has_key && b.x != kNoPlace && lane_.index < (entry_->head.wide_positions != 0 ? 8 : 4),
          to + C::kRopeOffset + 4 * kDim + 16 * lane_.index, of_lane(b.x));
    }
  }

  Lane lane_;
  const DecodeCall* call_;
  const DecodeEntry* entry_;
  StreamRecord* shared_;
  std::uint32_t record_;
  std::uint32_t ring_;
  int unit_;  // that is issued next
  unsigned state_ = 0;
  Stage current_ = {};
};

}  // namespace spindle::kernels::device
