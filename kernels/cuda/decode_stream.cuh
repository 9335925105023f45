#pragma once
// The stream of a warp's data in the kernel with a table of levels. Like the pipe of
// decode_pipe.cuh a warp copies its own units, asynchronously and two stages ahead, but they are of
// levels or elements alone, and both sides of a block of levels are one stage: less to do for each.

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

template <typename C>
class LevelStream {
 public:
  static constexpr int kDim = C::kDim;
  static constexpr int kDescriptors = 4;  // of units, in shared memory
  static_assert(C::kLevelTable && C::kStages == 2);

  // The units first, first + kWarps .. below `end` of the entry, which is in shared memory, as is
  // the room for descriptors. `ring`: shared address of the stages.
  __device__ LevelStream(const DecodeCall& call, const DecodeEntry& entry,
                         DeviceKvBlock (&descriptors)[kDescriptors], std::uint32_t ring, int first,
                         int end)
      : call_(&call),
        entry_(&entry),
        descriptors_(shared_address(descriptors)),
        ring_(ring),
        unit_(first),
        end_(end) {
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
  __device__ std::uint32_t data() const { return ring_ + slot_ * C::kStageBytes; }
  // The current stage has been read: the next but one goes where it was, the next is current.
  __device__ void go_on() {
    __syncwarp();
    put(issue(data()));
  }
  // The same faster, when the next but one is a block whose stage has the bits `kBits`.
  template <int kKeyBits, int kValueBits, bool kListed>
  __device__ void go_on_run() {
    __syncwarp();
    const Stage stage = issue_like<kKeyBits, kValueBits, kListed>(data());
    put(stage.bits != 0 ? stage : issue(data()));
  }

 private:
  __device__ void put(const Stage& stage) {
    current_ = next_;
    next_ = stage;
    slot_ ^= 1U;
  }

  __device__ const std::byte* at(std::uint32_t place) const { return place_of(*call_, place); }

  __device__ std::uint32_t descriptor(int ahead) const {
    return descriptors_ + (turn_ + ahead) % kDescriptors * static_cast<int>(sizeof(DeviceKvBlock));
  }
  // The descriptor of the unit `ahead` units after the next is on its way, or a page number.
  __device__ void request(int ahead) const {
    const int unit = unit_ + ahead * C::kWarps;
    if (unit >= end_) return;
    const DeviceKvHead& head = entry_->head;
    const std::uint32_t to = descriptor(ahead);
    if (unit < head.n_blocks) {
      const auto* from = reinterpret_cast<const std::byte*>(head.blocks + unit);
      if (lane_.index < 4) copy_8(to + 8 * lane_.index, from + 8 * lane_.index);
    } else if (lane_.index == 0) {
      copy_4(to, head.pages + (unit - head.n_blocks + first_tail_page(*entry_)));
    }
  }

  // The next stage when it is a complete block of such levels; else nothing, and `bits` of 0.
  template <int kKeyBits, int kValueBits, bool kListed>
  __device__ Stage issue_like(std::uint32_t to) {
    constexpr std::uint32_t kVisible = kKvBlockTokens << 24;
    Stage stage = {};
    if (part_ != 0 || unit_ >= end_ || unit_ >= entry_->head.n_blocks) return stage;
    const uint4 a = load_shared(descriptor(0));
    const uint4 b = load_shared(descriptor(0) + 16);
    if (b.z != (kVisible | static_cast<std::uint32_t>(lloyd_format(kKeyBits)) |
                static_cast<std::uint32_t>(lloyd_format(kValueBits)) << 8) ||
        (b.w & 0xffU) != kKvBlockTokens || (b.x != kNoPlace) != kListed) {
      return stage;
    }
    request(2);
    copy_levels(to, a, b, true, true, kKeyBits, kValueBits);
    commit_copies();
    stage.first_position = static_cast<std::int32_t>(b.y);
    stage.bits = run_bits<kKeyBits, kValueBits>(kListed);
    go_to_next_unit();
    return stage;
  }

  __device__ void go_to_next_unit() {
    unit_ += C::kWarps;
    turn_ = (turn_ + 1) % kDescriptors;
  }

  // The next stage, to `to`; behind the last one nothing.
  __device__ Stage issue(std::uint32_t to) {
    Stage stage = {0, 0, 0, Stage::kOver};
    if (unit_ < end_) {
      if (part_ == 0) request(2);
      uint4 a = load_shared(descriptor(0));
      uint4 b = load_shared(descriptor(0) + 16);
      if (unit_ >= entry_->head.n_blocks) page_as_block(a, b, *entry_, *call_, unit_);
      const auto k_format = static_cast<KvFormat>(b.z & 0xff);
      const auto v_format = static_cast<KvFormat>(b.z >> 8 & 0xff);
      const bool k_elements = is_elements(k_format);
      const bool is_both = !k_elements && !is_elements(v_format);
      const int k_parts = k_elements ? kDim / 64 : 1;
      const int v_parts = is_elements(v_format) ? kDim / 64 : 1;
      const bool is_key = part_ < k_parts;
      stage.codes = is_key ? a.x : a.z;
      stage.first_position = static_cast<std::int32_t>(b.y);
      stage.bits = Stage::pack_bits(
          is_key ? k_format : v_format, is_key, is_key ? part_ : part_ - k_parts,
          part_ == k_parts - 1, static_cast<int>(b.z >> 16 & 0xff), static_cast<int>(b.z >> 24),
          static_cast<int>(b.w & 0xff), b.x != kNoPlace, is_both ? static_cast<int>(v_format) : 0);
      if (is_elements(stage.format())) {
        copy_elements_apart<kDim>(to, at(stage.codes), stage);
      } else {
        copy_levels(to, a, b, is_key, !is_key || is_both, bits_of(k_format), bits_of(v_format));
      }
      if (is_both || ++part_ == k_parts + v_parts) {
        part_ = 0;
        go_to_next_unit();
      }
    }
    commit_copies();
    return stage;
  }

  template <int kMaxBytes>
  __device__ void copy(std::uint32_t to, const std::byte* from, int n_bytes) const {
    to += 16 * lane_.index;
    from += 16 * lane_.index;
#pragma unroll
    for (int i = 0; i < kMaxBytes; i += 512) {
      if (i + 16 * lane_.index < n_bytes) copy_16(to + i, from + i);
    }
  }

  // `a` and `b`: the block's descriptor.
  __device__ void copy_levels(std::uint32_t to, const uint4& a, const uint4& b, bool has_key,
                              bool has_value, int k_bits, int v_bits) const {
    constexpr int kScalePieces = 4;  // of 16 bytes
    const int k_bytes = 4 * kDim * k_bits;
    const int v_bytes = 4 * kDim * v_bits;
    const std::uint32_t v_to = has_key ? to + C::kValueOffset : to;
    if (has_key) copy<16 * kDim>(to, at(a.x), k_bytes);
    if (has_value) copy<16 * kDim>(v_to, at(a.z), v_bytes);
    const auto base = static_cast<std::int32_t>(b.y);
    if (has_key && base >= 0 && base < call_->max_positions) {
      // kDim / 8 pieces of cos, then as many of sin.
      const float* angles = lane_.index < kDim / 8 ? call_->rope_cos : call_->rope_sin;
      angles += std::int64_t{base} * (kDim / 2) + lane_.index % (kDim / 8) * 4;
      if (lane_.index < kDim / 4) copy_16(to + C::kRopeOffset + 16 * lane_.index, angles);
    }
    // Scales of both sides and positions by different lanes.
    if (lane_.index < kScalePieces) {
      if (has_key) copy_piece(to + k_bytes, a.y, lane_.index);
    } else if (lane_.index < 2 * kScalePieces) {
      if (has_value) copy_piece(v_to + v_bytes, a.w, lane_.index - kScalePieces);
    } else if (has_key && b.x != kNoPlace) {
      const int piece = lane_.index - 2 * kScalePieces;
      if (piece < (entry_->head.wide_positions != 0 ? 8 : 4)) {
        copy_piece(to + C::kRopeOffset + 4 * kDim, b.x, piece);
      }
    }
  }
  __device__ void copy_piece(std::uint32_t to, std::uint32_t place, int piece) const {
    copy_16(to + 16 * piece, at(place) + 16 * piece);
  }

  const DecodeCall* call_;
  const DecodeEntry* entry_;
  std::uint32_t descriptors_;
  std::uint32_t ring_;
  int unit_;  // that is issued next
  int end_;
  int part_ = 0;                // of it
  int turn_ = 0;                // place of its descriptor
  std::uint32_t slot_ = 0;      // of the current stage
  Stage current_ = {};
  Stage next_ = {};
  Lane lane_;
};

}  // namespace spindle::kernels::device
