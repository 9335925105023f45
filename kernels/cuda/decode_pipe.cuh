#pragma once
// The stream of a warp's data: its units' sides go through a ring of stages in shared memory,
// copied asynchronously some stages ahead of their use. A side of coded planes is one stage; a side
// of 16-bit elements is head_dim / 64 stages of 64 channels. Descriptors of units (blocks of the
// table or page numbers) go through a ring of their own, further ahead.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/decode_plan.cuh"
#include "kernels/cuda/mma.cuh"

namespace spindle::kernels::device {

inline constexpr int kTeamsPerMultiprocessor = 2;
inline constexpr int kSharedBytesPerMultiprocessor = 228 << 10;  // sm_90; each CTA takes 1 KiB more
inline constexpr std::size_t kSystemSharedBytes = 1024;          // of a CTA, at the beginning
inline constexpr int kDescriptors = 16;                          // of a warp
inline constexpr int kBatch = 4;  // units whose stages are listed at once
inline constexpr int kListedStages = 32;
inline constexpr unsigned kAllLanes = 0xffffffffU;

// A stage: codes, then their scales; or 64 channels of 32 tokens. Behind them for keys before RoPE
// the cos and sin rows, f32 [kDim / 2] each, of the block's base position and the list of
// positions; and the magnitudes of a codebook.
inline constexpr int kElementBytes = 4096;
template <int kDim>
inline constexpr int kRopeBytes = 4 * kDim + 128;
template <int kDim>
inline constexpr int kScalesOffset = kElementBytes + kRopeBytes<kDim>;

// What a kernel is compiled for. Each set of formats has registers and warps of its own. With a
// table of levels, for which a CTA takes all shared memory of a multiprocessor of Hopper, levels
// are looked up there; else they are put together in registers.
template <int kDim_, bool kBf16_, DecodeFormats kFormats, bool kLevelTable_ = false>
struct Config {
  static constexpr int kDim = kDim_;
  static constexpr bool kBf16 = kBf16_;  // pages and raw blocks; else f16
  static constexpr bool kLevelTable = kLevelTable_;
  static constexpr bool kAll = kFormats == DecodeFormats::kAll;
  static constexpr bool kInt4 = kAll || kFormats == DecodeFormats::kInt4;
  static constexpr bool kLloyd = kAll || kFormats == DecodeFormats::kLloyd;
  static constexpr bool kRows = kAll || kFormats == DecodeFormats::kRows;
  static constexpr bool kKivi = kAll || kFormats == DecodeFormats::kKivi;
  static constexpr bool kCoded = kInt4 || kLloyd || kKivi;
  static constexpr bool kHadamard = kInt4 || kLloyd;
  static constexpr bool kBeforeRope = kLloyd || kRows;
  // Whether there are rows and pages only, which have a stream of their own.
  static constexpr bool kRowStream = kFormats == DecodeFormats::kRows;
  // Rows of the table of steps; with 64, blocks that keep half of their tokens need no strides.
  static constexpr int kStepRows = kLevelTable || kRowStream ? 64 : 32;
  // Teams of a CTA share its tables.
  static constexpr int kTeams = kLevelTable ? 2 : 1;
  static constexpr int kWarps =
      kFormats == DecodeFormats::kInt4 || kFormats == DecodeFormats::kKivi ? 8 : 6;
  static constexpr int kThreads = 32 * kWarps;  // of a team
  static constexpr int kStages = kLevelTable || kAll ? 2 : kFormats == DecodeFormats::kRaw ? 4 : 3;
  static constexpr int kRopeOffset = kRows ? kElementBytes : 16 * kDim + 128;
  // Where a stage of two coded sides has the values.
  static constexpr int kValueOffset = kRopeOffset + kRopeBytes<kDim>;
  static constexpr int kCodedBytes = kLevelTable ? kValueOffset + 16 * kDim + 128 : 0;
  static constexpr int kStageBytes = kRows && !kRowStream          ? kScalesOffset<kDim> + 64
                                     : kCodedBytes > kElementBytes ? kCodedBytes
                                                                   : kElementBytes;
  static_assert(!kBeforeRope || kRowStream || kRopeOffset + kRopeBytes<kDim> <= kStageBytes);
  // What a stream of rows has beside the stages, for each of two units.
  static constexpr int kBesideBytes = kRowStream ? kRopeBytes<kDim> + 128 : 0;
};

// One stage of a unit (a block of the table, or a page of the tail as a raw block): 64 channels of
// a side of elements, or a whole side of codes.
struct alignas(16) Stage {
  std::uint32_t codes;
  std::uint32_t scales;
  std::int32_t first_position;
  std::uint32_t bits;

  static constexpr std::uint32_t kOver = ~0U;  // bits of the stage behind the last

  // `descriptor` is the place of the unit's in the warp's ring. In a stage of two coded sides it is
  // the values' format, which is never kRaw.
  __device__ static constexpr std::uint32_t pack_bits(KvFormat format, bool is_key, int part,
                                                      bool is_last_key, int first, int end,
                                                      int capacity, bool is_listed,
                                                      int descriptor = 0) {
    return static_cast<std::uint32_t>(format) | (is_key ? 0x10U : 0U) |
           static_cast<std::uint32_t>(part) << 5 | (is_last_key ? 0x40U : 0U) |
           (is_listed ? 0x80U : 0U) | static_cast<std::uint32_t>(first) << 8 |
           static_cast<std::uint32_t>(end) << 14 | static_cast<std::uint32_t>(capacity) << 20 |
           static_cast<std::uint32_t>(descriptor) << 26;
  }
  __device__ KvFormat format() const { return static_cast<KvFormat>(bits & 0xfU); }
  __device__ bool is_key() const { return (bits & 0x10U) != 0; }
  __device__ int part() const { return static_cast<int>(bits >> 5 & 1U); }
  __device__ bool is_last_key() const { return (bits & 0x40U) != 0; }
  __device__ bool is_listed() const { return (bits & 0x80U) != 0; }
  __device__ int first() const { return static_cast<int>(bits >> 8 & 0x3fU); }
  __device__ int end() const { return static_cast<int>(bits >> 14 & 0x3fU); }
  __device__ int capacity() const { return static_cast<int>(bits >> 20 & 0x3fU); }
  __device__ int descriptor() const { return static_cast<int>(bits >> 26); }
  __device__ bool is_both() const { return bits >> 26 != 0; }
  __device__ Stage values() const {
    return {codes, scales, first_position, (bits & ~0x1fU) | bits >> 26};
  }
  __device__ bool is_partial() const { return (bits & 0xfff00U) != (32U << 14); }
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

__device__ inline bool is_row(KvFormat format) {
  return format == KvFormat::kCodebook || format == KvFormat::kToken;
}
__device__ inline bool is_before_rope(KvFormat format) {
  return has_levels(format) || is_row(format);
}

// What lies in hidden slots is never used as an index: they read the nearest visible slot's.
__device__ inline int visible_slot(int first, int end, int slot) {
  return slot < first ? first : slot < end ? slot : end - 1;
}
// 16-byte pieces of gathered V rows change places by this.
__device__ inline int row_swizzle(int token) { return token / 8 * 2 + token % 2; }

// What the lanes of a warp own: token row r = g + 8 h of tile t is token 4 t + 2 h of key_token(),
// and V's channels x = 0, 1 of tile m are 16 m + 8 x + g.
struct Lane {
  int index = static_cast<int>(threadIdx.x) % 32;
  int g = index / 4;
  int q = index % 4;
  __device__ int key_token() const { return 8 * (g / 2) + g % 2; }
};

// 64 channels of one side, elements, by a warp.
template <int kDim>
__device__ inline void copy_elements(std::uint32_t to, const std::byte* from, const Stage& stage,
                                     const Lane& lane) {
  const int capacity = stage.capacity();
  if (capacity == kKvBlockTokens) {
    from += stage.part() * kElementBytes + 16 * lane.index;
#pragma unroll
    for (int i = 0; i < kElementBytes; i += 512) copy_16(to + i + 16 * lane.index, from + i);
    return;
  }
  if (stage.is_key()) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int token = i % 4 * 8 + lane.g;
      const int chunk = 2 * stage.part() + i / 4;
      const bool valid = token < capacity;
      const int row = valid ? chunk * capacity + token : 0;
      copy_16(to + (i / 4 * 32 + token) * 64 + 16 * lane.q, from + row * 64 + 16 * lane.q, valid);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
    const int channel = 4 * i + lane.index / 8;
    const int piece = lane.index % 8;
    const bool valid = 4 * piece < capacity;
    const int offset = valid ? (64 * stage.part() + channel) * 2 * capacity + 8 * piece : 0;
    copy_8(to + channel * 64 + 8 * piece, from + offset, valid);
  }
}

__device__ inline const std::byte* place_of(const DecodeCall& call, std::uint32_t place) {
  return call.pool + std::uint64_t{place} * kKvPlaceBytes;
}

// The descriptor (a, b) of a unit that is a page of the tail, whose number is in a.x.
__device__ inline void page_as_block(uint4& a, uint4& b, const DecodeEntry& entry,
                                     const DecodeCall& call, int unit) {
  const int index = unit - entry.head.n_blocks + first_tail_page(entry);
  const int begin = entry.head.tail_origin + index * kKvBlockTokens;
  const int first = max(0, entry.head.tail_first - begin);
  const int end = min(kKvBlockTokens, entry.n_context - begin);
  a.x = static_cast<std::uint32_t>(a.x * (call.page_bytes / kKvPlaceBytes));
  a.z = a.x + 64 * call.head_dim / kKvPlaceBytes;
  b.x = kNoPlace;
  b.z = static_cast<std::uint32_t>(first) << 16 | static_cast<std::uint32_t>(end) << 24;
  b.w = kKvBlockTokens;
}

template <typename C>
struct Pipe {
  static constexpr int kDim = C::kDim;
  static constexpr int kWarps = C::kWarps;
  static constexpr int kElementParts = kDim / 64;
  static_assert(kBatch * 4 + C::kStages <= kListedStages);

  // What a lane knows of token `lane` of a unit: numbers of its rows, then the rows.
  struct RowNumbers {
    std::uint32_t k = 0;
    std::uint32_t v = 0;
  };
  struct RowAddresses {
    const std::byte* k = nullptr;
    const std::byte* v = nullptr;
  };

  const DecodeCall& call;
  const DecodeEntry* entry;  // shared memory
  Stage* stages;             // shared memory
  std::uint32_t ring;        // shared addresses
  std::uint32_t descriptors;
  Lane lane;
  int first_unit;  // the warp's unit i is first_unit + i * kWarps of the entry
  int n_units;
  int n_listed_units = 0;
  int n_listed = 0;  // stages
  int n_issued = 0;
  std::uint32_t slot = 0;  // distance of the next stage to be issued in the ring
  bool has_rows = false;
  int row_unit = 0;              // whose rows are issued next
  RowNumbers next_numbers = {};  // of row_unit + 1
  RowAddresses rows = {};        // of the unit whose parts are being issued
  RowAddresses next_rows = {};   // of row_unit

  __device__ const std::byte* at(std::uint32_t place) const { return place_of(call, place); }
  __device__ static int parts(KvFormat format) { return is_elements(format) ? kElementParts : 1; }
  __device__ std::uint32_t descriptor_of(int i) const {
    return descriptors + i % kDescriptors * static_cast<int>(sizeof(DeviceKvBlock));
  }

  __device__ void fetch_descriptors(int i) {
    i += lane.index / 4;
    if (lane.index >= 4 * kBatch || i >= n_units) return;
    const int number = first_unit + i * kWarps;
    const std::uint32_t to = descriptor_of(i);
    const int piece = lane.index % 4;
    if (number < entry->head.n_blocks) {
      copy_8(to + 8 * piece,
             reinterpret_cast<const std::byte*>(entry->head.blocks + number) + 8 * piece);
    } else if (piece == 0) {
      copy_4(to, entry->head.pages + (number - entry->head.n_blocks + first_tail_page(*entry)));
    }
  }

  // Lists the stages of the next units, a lane a unit, and fetches the descriptors after them.
  __device__ void list_stages() {
    const int i = n_listed_units + lane.index;
    uint4 a = {};
    uint4 b = {};
    int k_parts = 0;
    int n = 0;
    if (lane.index < kBatch && i < n_units) {
      const int number = first_unit + i * kWarps;
      a = load_shared(descriptor_of(i));
      b = load_shared(descriptor_of(i) + 16);
      if (number >= entry->head.n_blocks) {
        page_as_block(a, b, *entry, call, number);
      }
      k_parts = parts(static_cast<KvFormat>(b.z & 0xff));
      n = k_parts + parts(static_cast<KvFormat>(b.z >> 8 & 0xff));
    }
    int behind = n;
#pragma unroll
    for (int step = 1; step < kBatch; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, behind, step);
      if (lane.index >= step) behind += below;
    }
    for (int p = 0; p < n; ++p) {
      const bool is_key = p < k_parts;
      Stage stage;
      stage.codes = is_key ? a.x : a.z;
      stage.scales = is_key ? a.y : a.w;
      stage.first_position = static_cast<std::int32_t>(b.y);
      stage.bits = Stage::pack_bits(
          static_cast<KvFormat>((is_key ? b.z : b.z >> 8) & 0xff), is_key, is_key ? p : p - k_parts,
          p == k_parts - 1, static_cast<int>(b.z >> 16 & 0xff), static_cast<int>(b.z >> 24),
          static_cast<int>(b.w & 0xff), b.x != kNoPlace, i % kDescriptors);
      stages[(n_listed + behind - n + p) % kListedStages] = stage;
    }
    n_listed += __shfl_sync(kAllLanes, behind, kBatch - 1);
    n_listed_units += kBatch;
    __syncwarp();
    fetch_descriptors(n_listed_units);
  }

  __device__ Stage listed(int i) const {
    const uint4 x = load_shared(shared_address(stages + i % kListedStages));
    return {x.x, x.y, static_cast<std::int32_t>(x.z), x.w};
  }
  __device__ std::uint32_t positions_of(const Stage& stage) const {
    return load_shared_4(descriptor_of(stage.descriptor()) + 16);
  }

  template <int kMaxBytes>
  __device__ void copy(std::uint32_t to, const std::byte* from, int n_bytes) const {
#pragma unroll
    for (int i = 0; i < kMaxBytes; i += 512) {
      const int offset = i + 16 * lane.index;
      if (offset < n_bytes) copy_16(to + offset, from + offset);
    }
  }

  __device__ void copy_codes(std::uint32_t to, const Stage& stage) const {
    const int n_bytes = 4 * kDim * bits_of(stage.format());
    copy<16 * kDim>(to, at(stage.codes), n_bytes);
    copy<4 * kDim>(to + n_bytes, at(stage.scales), scale_bytes<kDim>(stage.format()));
  }

  // What keys before RoPE need besides.
  __device__ void copy_angles(std::uint32_t to, const Stage& stage) const {
    if (stage.first_position >= 0 && stage.first_position < call.max_positions) {
      const std::int64_t row = std::int64_t{stage.first_position} * (kDim / 2);
      const auto* cos = reinterpret_cast<const std::byte*>(call.rope_cos + row);
      const auto* sin = reinterpret_cast<const std::byte*>(call.rope_sin + row);
      copy<2 * kDim>(to + C::kRopeOffset, cos, 2 * kDim);
      copy<2 * kDim>(to + C::kRopeOffset + 2 * kDim, sin, 2 * kDim);
    }
    const std::uint32_t positions = positions_of(stage);
    if (positions != kNoPlace) {
      copy<128>(to + C::kRopeOffset + 4 * kDim, at(positions),
                entry->head.wide_positions != 0 ? 128 : 64);
    }
  }

  __device__ RowNumbers load_numbers(int i) const {
    RowNumbers numbers;
    if (i >= n_units || first_unit + i * kWarps >= entry->head.n_blocks) return numbers;
    const uint4 a = load_shared(descriptor_of(i));
    const std::uint32_t formats = load_shared_4(descriptor_of(i) + 24);
    const auto k_format = static_cast<KvFormat>(formats & 0xff);
    const int token = visible_slot(static_cast<int>(formats >> 16 & 0xff),
                                   static_cast<int>(formats >> 24), lane.index);
    const auto number = [&](std::uint32_t place, bool wide) -> std::uint32_t {
      if (wide) return reinterpret_cast<const std::uint32_t*>(at(place))[token];
      return reinterpret_cast<const std::uint16_t*>(at(place))[token];
    };
    const bool is_token = k_format == KvFormat::kToken;
    if (is_row(k_format)) numbers.k = number(a.x, is_token && entry->head.wide_ids != 0);
    if (static_cast<KvFormat>(formats >> 8 & 0xff) == KvFormat::kCodebook) {
      numbers.v = number(a.z, false);
    }
    if (is_token) numbers.v = numbers.k;
    return numbers;
  }
  __device__ const std::byte* row(KvFormat format, std::uint32_t number,
                                  const std::uint32_t* chunks, const std::uint16_t* tokens) const {
    if (format == KvFormat::kToken) {
      return reinterpret_cast<const std::byte*>(tokens + number * entry->head.token_stride);
    }
    return at(chunks[number / kCodebookChunkEntries]) + number % kCodebookChunkEntries * (2 * kDim);
  }
  __device__ RowAddresses find_rows(int i, const RowNumbers& numbers) const {
    RowAddresses found;
    if (i >= n_units || first_unit + i * kWarps >= entry->head.n_blocks) return found;
    const std::uint32_t formats = load_shared_4(descriptor_of(i) + 24);
    const auto k_format = static_cast<KvFormat>(formats & 0xff);
    const auto v_format = static_cast<KvFormat>(formats >> 8 & 0xff);
    const DeviceKvHead& head = entry->head;
    if (is_row(k_format)) found.k = row(k_format, numbers.k, head.k_entries, head.k_tokens);
    if (is_row(v_format)) found.v = row(v_format, numbers.v, head.v_entries, head.v_tokens);
    return found;
  }
  // Rows are found two units ahead, step by step, so that no step waits for memory.
  __device__ void advance_rows() {
    rows = next_rows;
    next_rows = find_rows(row_unit + 1, next_numbers);
    next_numbers = load_numbers(row_unit + 2);
    ++row_unit;
  }

  __device__ static const std::byte* of_lane(const std::byte* p, int source) {
    return reinterpret_cast<const std::byte*>(
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(p), source));
  }

  // 64 channels of 32 gathered rows: of K the chunks `part` and part + kDim / 64.
  __device__ void copy_rows(std::uint32_t to, const Stage& stage) const {
    if (stage.is_key()) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * i + lane.g;
        const std::byte* from = of_lane(rows.k, token) + 64 * stage.part() + 16 * lane.q;
        copy_16(to + token * 64 + 16 * lane.q, from);
        copy_16(to + 2048 + token * 64 + 16 * lane.q, from + kDim);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = 4 * i + lane.index / 8;
      const int piece = lane.index % 8;
      const std::byte* from = of_lane(rows.v, token) + 128 * stage.part() + 16 * piece;
      copy_16(to + token * 128 + (piece ^ row_swizzle(token)) * 16, from);
    }
  }

  __device__ void copy_stage(std::uint32_t to, const Stage& stage) {
    const KvFormat format = stage.format();
    if constexpr (C::kRows) {
      if (has_rows && stage.is_key() && stage.part() == 0) advance_rows();
    }
    if (format == KvFormat::kRaw) {
      copy_elements<kDim>(to, at(stage.codes), stage, lane);
      return;
    }
    if constexpr (C::kRows) {
      if (is_row(format)) {
        copy_rows(to, stage);
        if (format == KvFormat::kCodebook) copy<64>(to + kScalesOffset<kDim>, at(stage.scales), 64);
      }
    }
    if constexpr (C::kCoded) {
      if (!is_elements(format)) copy_codes(to, stage);
    }
    if constexpr (C::kBeforeRope) {
      if (stage.is_key() && is_before_rope(format)) copy_angles(to, stage);
    }
  }

  __device__ std::uint32_t next_slot(std::uint32_t from) const {
    return from == (C::kStages - 1) * C::kStageBytes ? 0 : from + C::kStageBytes;
  }

  // Issues the next stage; past the last one an empty group, so that groups can be counted.
  __device__ void issue() {
    if (n_issued == n_listed && n_listed_units < n_units) list_stages();
    if (n_issued < n_listed) {
      copy_stage(ring + slot, listed(n_issued));
      ++n_issued;
    }
    commit_copies();
    slot = next_slot(slot);
  }

  // The first descriptors, and what else is needed before stages can be issued.
  __device__ void start() {
    fetch_descriptors(0);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    if constexpr (C::kRows) {
      const DeviceKvHead& head = entry->head;
      has_rows = head.n_blocks > 0 && (head.k_entries != nullptr || head.v_entries != nullptr ||
                                       head.k_tokens != nullptr);
      if (has_rows) {
        next_rows = find_rows(0, load_numbers(0));
        next_numbers = load_numbers(1);
      }
    }
  }
};

}  // namespace spindle::kernels::device
