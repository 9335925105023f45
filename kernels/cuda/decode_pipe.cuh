#pragma once
// The stream of a warp's data: its units' sides go through a ring of stages in shared memory,
// copied asynchronously some stages ahead of their use. A side of coded planes is one stage; a side
// of 16-bit elements is head_dim / 64 stages of 64 channels. Descriptors of units (blocks of the
// table or page numbers) go through a ring of their own, further ahead.

#include <cstdint>

#include "kernels/cuda/decode_plan.cuh"
#include "kernels/cuda/mma.cuh"

namespace spindle::kernels::device {

inline constexpr int kWarps = 6;
inline constexpr int kCtasPerMultiprocessor = 2;
inline constexpr int kStages = 4;
inline constexpr int kStageBytes = 4096;
inline constexpr int kDescriptors = 16;  // of a warp
inline constexpr int kDescriptorBatch = 4;
inline constexpr unsigned kAllLanes = 0xffffffffU;

// A unit of up to 32 tokens: a block of the table, or a page of the tail as a raw block.
struct Unit {
  std::uint32_t k_codes;
  std::uint32_t k_scales;
  std::uint32_t v_codes;
  std::uint32_t v_scales;
  std::uint32_t positions;
  std::int32_t first_position;
  KvFormat k_format;
  KvFormat v_format;
  int first;
  int end;
  int capacity;

  __device__ bool partial() const { return first > 0 || end < kKvBlockTokens; }
};

__device__ inline bool is_elements(KvFormat format) {
  return format == KvFormat::kRaw || format == KvFormat::kCodebook || format == KvFormat::kToken;
}
__device__ inline int bits_of(KvFormat format) {
  switch (format) {
    case KvFormat::kLloyd3:
      return 3;
    case KvFormat::kKivi2:
    case KvFormat::kLloyd2:
      return 2;
    case KvFormat::kLloyd1:
      return 1;
    default:
      return 4;
  }
}
__device__ inline bool has_levels(KvFormat format) {
  return format >= KvFormat::kLloyd1 && format <= KvFormat::kLloyd4;
}
template <int kDim>
__device__ inline int scale_bytes(KvFormat format) {
  return format == KvFormat::kInt4 ? 128 : has_levels(format) ? 64 : 4 * kDim;
}

// What the lanes of a warp own: token row r = g + 8 h of tile t is token 4 t + 2 h of key_token(),
// and V's channels x = 0, 1 of tile m are 16 m + 8 x + g.
struct Lane {
  int index = static_cast<int>(threadIdx.x) % 32;
  int g = index / 4;
  int q = index % 4;
  __device__ int key_token() const { return 8 * (g / 2) + g % 2; }
};

template <int kDim>
struct Pipe {
  static constexpr int kElementParts = kDim / 64;

  const std::byte* pool;
  std::uint64_t page_bytes;
  const DecodeEntry* entry;  // shared memory
  std::uint32_t ring;        // shared addresses
  std::uint32_t descriptors;
  Lane lane;
  int first_unit;  // the warp's unit i is first_unit + i * kWarps of the entry
  int n_units;
  int unit = 0;  // next to be issued
  int part = 0;
  int slot = 0;

  __device__ const std::byte* at(std::uint32_t place) const {
    return pool + std::uint64_t{place} * kKvPlaceBytes;
  }

  __device__ static int parts(KvFormat format) { return is_elements(format) ? kElementParts : 1; }

  __device__ void fetch_descriptors(int i) {
    i += lane.index / 4;
    if (lane.index >= 4 * kDescriptorBatch || i >= n_units) return;
    const int number = first_unit + i * kWarps;
    const std::uint32_t to = descriptors + (i % kDescriptors) * sizeof(DeviceKvBlock);
    const int piece = lane.index % 4;
    if (number < entry->head.n_blocks) {
      copy_8(to + 8 * piece,
             reinterpret_cast<const std::byte*>(entry->head.blocks + number) + 8 * piece);
    } else if (piece == 0) {
      copy_4(to, entry->head.pages + (number - entry->head.n_blocks + first_tail_page(*entry)));
    }
  }

  __device__ Unit read_unit(int i) const {
    const std::uint32_t from = descriptors + (i % kDescriptors) * sizeof(DeviceKvBlock);
    const int number = first_unit + i * kWarps;
    if (number >= entry->head.n_blocks) {
      const std::uint64_t page = load_shared_4(from);
      const int index = number - entry->head.n_blocks + first_tail_page(*entry);
      const int begin = entry->head.tail_origin + index * kKvBlockTokens;
      Unit u{};
      u.k_codes = static_cast<std::uint32_t>(page * page_bytes / kKvPlaceBytes);
      u.v_codes = u.k_codes + 64 * kDim / kKvPlaceBytes;
      u.positions = kNoPlace;
      u.first_position = begin;
      u.k_format = KvFormat::kRaw;
      u.v_format = KvFormat::kRaw;
      u.first = max(0, entry->head.tail_first - begin);
      u.end = min(kKvBlockTokens, entry->n_context - begin);
      u.capacity = kKvBlockTokens;
      return u;
    }
    const uint4 a = load_shared(from);
    const uint4 b = load_shared(from + 16);
    Unit u;
    u.k_codes = a.x;
    u.k_scales = a.y;
    u.v_codes = a.z;
    u.v_scales = a.w;
    u.positions = b.x;
    u.first_position = static_cast<std::int32_t>(b.y);
    u.k_format = static_cast<KvFormat>(b.z & 0xff);
    u.v_format = static_cast<KvFormat>(b.z >> 8 & 0xff);
    u.first = static_cast<int>(b.z >> 16 & 0xff);
    u.end = static_cast<int>(b.z >> 24);
    u.capacity = static_cast<int>(b.w & 0xff);
    return u;
  }

  template <int kMaxBytes>
  __device__ void copy(std::uint32_t to, const std::byte* from, int n_bytes) const {
#pragma unroll
    for (int i = 0; i < kMaxBytes; i += 512) {
      const int offset = i + 16 * lane.index;
      if (offset < n_bytes) copy_16(to + offset, from + offset);
    }
  }

  // 64 channels of one side, elements.
  __device__ void copy_elements(std::uint32_t to, std::uint32_t place, bool is_key, int side_part,
                                int capacity) const {
    const std::byte* from = at(place);
    if (capacity == kKvBlockTokens) {
      from += side_part * kStageBytes + 16 * lane.index;
#pragma unroll
      for (int i = 0; i < kStageBytes; i += 512) copy_16(to + i + 16 * lane.index, from + i);
      return;
    }
    if (is_key) {
      for (int i = 0; i < 8; ++i) {
        const int token = i % 4 * 8 + lane.index / 4;
        const int chunk = 2 * side_part + i / 4;
        const bool valid = token < capacity;
        const int row = valid ? chunk * capacity + token : 0;
        copy_16(to + (i / 4 * 32 + token) * 64 + 16 * lane.q, from + row * 64 + 16 * lane.q, valid);
      }
      return;
    }
    for (int i = 0; i < 16; ++i) {
      const int channel = 4 * i + lane.index / 8;
      const int piece = lane.index % 8;
      const bool valid = 4 * piece < capacity;
      const int offset = valid ? (64 * side_part + channel) * 2 * capacity + 8 * piece : 0;
      copy_8(to + channel * 64 + 8 * piece, from + offset, valid);
    }
  }

  __device__ void copy_codes(std::uint32_t to, std::uint32_t codes, std::uint32_t scales,
                             KvFormat format) const {
    const int n_bytes = 4 * kDim * bits_of(format);
    copy<16 * kDim>(to, at(codes), n_bytes);
    copy<4 * kDim>(to + n_bytes, at(scales), scale_bytes<kDim>(format));
  }

  // Issues the next stage; past the last one an empty group, so that groups can be counted.
  __device__ void issue() {
    if (unit < n_units) {
      if (part == 0 && unit % kDescriptorBatch == 0) fetch_descriptors(unit + kDescriptorBatch);
      const Unit u = read_unit(unit);
      const std::uint32_t to = ring + slot * kStageBytes;
      const int k_parts = parts(u.k_format);
      if (part < k_parts) {
        if (is_elements(u.k_format)) {
          copy_elements(to, u.k_codes, true, part, u.capacity);
        } else {
          copy_codes(to, u.k_codes, u.k_scales, u.k_format);
        }
      } else if (is_elements(u.v_format)) {
        copy_elements(to, u.v_codes, false, part - k_parts, u.capacity);
      } else {
        copy_codes(to, u.v_codes, u.v_scales, u.v_format);
      }
      if (++part == k_parts + parts(u.v_format)) {
        part = 0;
        ++unit;
      }
    }
    commit_copies();
    slot = (slot + 1) % kStages;
  }

  __device__ void start() {
    fetch_descriptors(0);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    for (int i = 0; i < kStages; ++i) issue();
  }
};

}  // namespace spindle::kernels::device
