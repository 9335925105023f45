#pragma once
// The stream of a warp's data in the kernel of token ids and codebooks. All its units are of
// elements, so each has the same stages, known when the kernel is compiled: kDim / 64 of K, then as
// many of V, copied three stages ahead. The numbers of a unit's rows are loaded two units ahead and
// looked up in the codebook one unit ahead, so that no step waits for memory.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/decode_pipe.cuh"

namespace spindle::kernels::device {

// 64 channels of elements of a unit whose descriptor is (a, b); `part` counts the stages of both
// sides. Apart, since most stages are of rows.
template <int kDim>
__device__ __noinline__ void copy_raw_part(std::uint32_t to, const DecodeCall& call, uint4 a,
                                           uint4 b, int part) {
  constexpr int kParts = kDim / 64;
  const bool is_key = part < kParts;
  Stage stage = {};
  stage.bits = Stage::pack_bits(KvFormat::kRaw, is_key, is_key ? part : part - kParts, false, 0, 0,
                                static_cast<int>(b.w & 0xff), false);
  copy_elements<kDim>(to, place_of(call, is_key ? a.x : a.z), stage, Lane());
}

// What a warp keeps in shared memory for its stream: descriptors of units, from the one that is
// worked on to four ahead of those that are copied.
struct RowRecord {
  static constexpr int kDescriptors = 8;
  alignas(16) DeviceKvBlock descriptors[kDescriptors];
};

template <typename C>
class RowStream {
 public:
  static constexpr int kDim = C::kDim;
  static constexpr int kParts = kDim / 64;  // stages of a side
  // Beside the stages, for a unit: cos and sin rows of the base position, the list of positions,
  // magnitudes of K and of V.
  static constexpr int kMagnitudes = kRopeBytes<kDim>;
  static constexpr int kBesideBytes = C::kBesideBytes;
  static_assert(kMagnitudes + 128 <= kBesideBytes && kBesideBytes % 128 == 0);

  // The units first, first + kWarps .. below `end` of the entry, which is in shared memory, as is
  // the record. `descriptors` and `ring`: shared addresses of the record and of the stages.
  __device__ RowStream(const DecodeCall& call, const DecodeEntry& entry, std::uint32_t descriptors,
                       std::uint32_t ring, int first, int end)
      : call_(&call),
        entry_(&entry),
        descriptors_(descriptors),
        ring_(ring),
        slot_(ring),
        end_(end),
        unit_(first - C::kWarps),
        current_(first - C::kWarps) {
#pragma unroll
    for (int i = 0; i < 4; ++i) request_descriptor(first + i * C::kWarps, i);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    // Before unit 0, as advance() leaves it.
    found_ = look_up(load_numbers(first, 0));
    numbers_ = load_numbers(first + C::kWarps, 1);
    start<0>();
  }

  // Goes to the next unit; false behind the last.
  __device__ bool next() {
    current_ += C::kWarps;
    if (current_ >= end_) return false;
    uint4 a = {};
    uint4 b = load_shared(descriptor(n_current_) + 16);
    if (current_ >= entry_->head.n_blocks) page_as_block(a, b, *entry_, *call_, current_);
    ++n_current_;
    stage_.first_position = static_cast<std::int32_t>(b.y);
    stage_.bits = Stage::pack_bits(static_cast<KvFormat>(b.z & 0xff), true, 0, true,
                                   static_cast<int>(b.z >> 16 & 0xff), static_cast<int>(b.z >> 24),
                                   static_cast<int>(b.w & 0xff), b.x != kNoPlace);
    value_format_ = static_cast<KvFormat>(b.z >> 8 & 0xff);
    return true;
  }
  // The unit: format of K, visible tokens.
  __device__ const Stage& unit() const { return stage_; }
  __device__ KvFormat value_format() const { return value_format_; }
  __device__ std::uint32_t beside() const { return beside_of(n_current_ - 1); }

  // Waits for the current stage's data, and for the unit's beside it.
  __device__ void wait() const {
    wait_copies<C::kStages - 1>();
    __syncwarp();
  }
  __device__ std::uint32_t data() const { return slot_; }
  // The stage `kPart` of the unit has been read: what comes kStages later goes where it was.
  template <int kPart>
  __device__ void go_on() {
    __syncwarp();
    issue<(kPart + C::kStages) % (2 * kParts)>(slot_);
    slot_ = slot_ == ring_ + (C::kStages - 1) * C::kStageBytes ? ring_ : slot_ + C::kStageBytes;
  }

 private:
  struct Numbers {
    std::uint32_t formats = 0;  // as in the descriptor; 0: no rows
    std::uint32_t k = 0;        // of the lane's token
    std::uint32_t v = 0;
  };
  // A row is the sum of the two, in units of row_bytes from the side's base.
  struct Found {
    std::uint32_t formats = 0;
    std::uint32_t k = 0;
    std::uint32_t k_more = 0;
    std::uint32_t v = 0;
    std::uint32_t v_more = 0;
  };

  __device__ static KvFormat key_format(std::uint32_t formats) {
    return static_cast<KvFormat>(formats & 0xff);
  }
  __device__ static KvFormat value_format(std::uint32_t formats) {
    return static_cast<KvFormat>(formats >> 8 & 0xff);
  }
  __device__ const std::byte* at(std::uint32_t place) const { return place_of(*call_, place); }
  __device__ std::uint32_t descriptor(int i) const {
    return descriptors_ + static_cast<std::uint32_t>(i % RowRecord::kDescriptors) *
                              static_cast<std::uint32_t>(sizeof(DeviceKvBlock));
  }
  __device__ std::uint32_t beside_of(int i) const {
    return ring_ + C::kStages * C::kStageBytes + (i % 2 == 0 ? 0 : kBesideBytes);
  }

  // The descriptor of a unit, which is the warp's i-th, or its page number.
  __device__ void request_descriptor(int unit, int i) const {
    const bool is_block = unit < min(end_, entry_->head.n_blocks);
    copy_8_if(is_block && lane_.index < 4, descriptor(i) + 8 * lane_.index,
              reinterpret_cast<const std::byte*>(entry_->head.blocks + unit) + 8 * lane_.index);
    if (!is_block && unit < end_ && lane_.index == 0) {
      copy_4(descriptor(i),
             entry_->head.pages + (unit - entry_->head.n_blocks + first_tail_page(*entry_)));
    }
  }

  // What lies in hidden slots is never used: they read the nearest visible slot's.
  __device__ Numbers load_numbers(int unit, int i) const {
    Numbers numbers;
    if (unit >= min(end_, entry_->head.n_blocks)) return numbers;
    numbers.formats = load_shared_4(descriptor(i) + 24);
    const KvFormat k = key_format(numbers.formats);
    const KvFormat v = value_format(numbers.formats);
    const int token = visible_slot(static_cast<int>(numbers.formats >> 16 & 0xff),
                                   static_cast<int>(numbers.formats >> 24), lane_.index);
    const uint4 a = load_shared(descriptor(i));
    if (k == KvFormat::kToken && entry_->head.wide_ids != 0) {
      numbers.k = reinterpret_cast<const std::uint32_t*>(at(a.x))[token];
    } else if (is_row(k)) {
      numbers.k = reinterpret_cast<const std::uint16_t*>(at(a.x))[token];
    }
    if (v == KvFormat::kCodebook) {
      numbers.v = reinterpret_cast<const std::uint16_t*>(at(a.z))[token];
    }
    return numbers;
  }

  // Entries lie in chunks, whose places are listed; ids are rows as they are, of both sides.
  __device__ Found look_up(const Numbers& numbers) const {
    constexpr std::uint32_t kRowPlaces = 2 * kDim / kKvPlaceBytes;
    Found found;
    found.formats = numbers.formats;
    if (key_format(numbers.formats) == KvFormat::kToken) {
      found.k = found.v = numbers.k;
      return found;
    }
    if (key_format(numbers.formats) == KvFormat::kCodebook) {
      found.k = entry_->head.k_entries[numbers.k / kCodebookChunkEntries];
      found.k_more = numbers.k % kCodebookChunkEntries * kRowPlaces;
    }
    if (value_format(numbers.formats) == KvFormat::kCodebook) {
      found.v = entry_->head.v_entries[numbers.v / kCodebookChunkEntries];
      found.v_more = numbers.v % kCodebookChunkEntries * kRowPlaces;
    }
    return found;
  }

  // The next unit is copied from here on.
  __device__ void advance() {
    unit_ += C::kWarps;
    formats_ = found_.formats;
    k_row_ = found_.k + found_.k_more;
    v_row_ = found_.v + found_.v_more;
    const bool is_token = key_format(formats_) == KvFormat::kToken;
    row_bytes_ =
        is_token ? static_cast<std::uint32_t>(2 * entry_->head.token_stride) : kKvPlaceBytes;
    found_ = look_up(numbers_);
    numbers_ = load_numbers(unit_ + 2 * C::kWarps, n_units_ + 2);
    request_descriptor(unit_ + 4 * C::kWarps, n_units_ + 4);
    ++n_units_;
  }

  template <int kPart>
  __device__ void start() {
    issue<kPart % (2 * kParts)>(ring_ + kPart * C::kStageBytes);
    if constexpr (kPart + 1 < C::kStages) start<kPart + 1>();
  }

  // The stage `kPart` of the unit that is copied, or of the next one when it is the first; behind
  // the last one an empty group, so that groups can be counted.
  template <int kPart>
  __device__ void issue(std::uint32_t to) {
    if constexpr (kPart == 0) advance();
    if (unit_ < end_) {
      const bool has_keys = is_row(key_format(formats_));
      const bool has_values = is_row(value_format(formats_));
      if (kPart == 0 && (has_keys || has_values)) copy_beside();
      if (kPart < kParts ? has_keys : has_values) {
        if constexpr (kPart < kParts) {
          gather_keys<kPart>(to);
        } else {
          gather_values<kPart - kParts>(to);
        }
      } else {
        copy_raw(to, kPart);
      }
    }
    commit_copies();
  }

  __device__ void copy_raw(std::uint32_t to, int part) const {
    uint4 a = load_shared(descriptor(n_units_ - 1));
    uint4 b = load_shared(descriptor(n_units_ - 1) + 16);
    if (unit_ >= entry_->head.n_blocks) page_as_block(a, b, *entry_, *call_, unit_);
    copy_raw_part<kDim>(to, *call_, a, b, part);
  }

  __device__ void copy_beside() const {
    const std::uint32_t from = descriptor(n_units_ - 1);
    const uint4 a = load_shared(from);
    const uint4 b = load_shared(from + 16);
    const std::uint32_t to = beside_of(n_units_ - 1) + 16 * lane_.index;
    // Not for a base of -1 either.
    const bool has_base = is_row(key_format(formats_)) && b.y < call_->max_positions;
    copy_16_if(has_base && lane_.index < kDim / 4, to,
               (lane_.index < kDim / 8 ? call_->rope_cos : call_->rope_sin) +
                   4 * (lane_.index % (kDim / 8)) + std::int64_t{b.y} * (kDim / 2));
    copy_16_if(b.x != kNoPlace && lane_.index < (entry_->head.wide_positions != 0 ? 8 : 4),
               to + 4 * kDim, at(b.x) + 16 * lane_.index);
    // Magnitudes of both sides by different lanes.
    const bool of_key = lane_.index < 4;
    const KvFormat format = of_key ? key_format(formats_) : value_format(formats_);
    copy_16_if(format == KvFormat::kCodebook && lane_.index < 8, to + kMagnitudes,
               at(of_key ? a.y : a.w) + 16 * (lane_.index % 4));
  }

  // Rows from `base`, whose numbers the lanes have for their tokens, [token of 32].
  __device__ const std::byte* row_of(const std::byte* base, std::uint32_t rows, int token) const {
    return base + std::uint64_t{__shfl_sync(kAllLanes, rows, token)} * row_bytes_;
  }
  // 64 channels of 32 rows: of K the chunks kPart and kPart + kDim / 64, as pages have them.
  template <int kPart>
  __device__ void gather_keys(std::uint32_t to) const {
    const std::byte* base = key_format(formats_) == KvFormat::kToken
                                ? reinterpret_cast<const std::byte*>(entry_->head.k_tokens)
                                : call_->pool;
    base += 64 * kPart + 16 * lane_.q;
    to += 16 * lane_.index;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::byte* from = row_of(base, k_row_, 8 * i + lane_.g);
      copy_16(to + 512 * i, from);
      copy_16(to + 512 * i + 2048, from + kDim);
    }
  }
  // Of V rows of 64 channels, whose pieces of 16 bytes change places by row_swizzle().
  template <int kPart>
  __device__ void gather_values(std::uint32_t to) const {
    const int piece = lane_.index % 8;
    const int row = lane_.index / 8;
    const std::byte* base = key_format(formats_) == KvFormat::kToken
                                ? reinterpret_cast<const std::byte*>(entry_->head.v_tokens)
                                : call_->pool;
    base += 128 * kPart + 16 * piece;
    to += row * 128 + (piece ^ row % 2) * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      static_assert(C::kStageBytes % 128 == 0);  // so that the piece is in bits of its own
      copy_16((to ^ i / 2 * 32) + 512 * i, row_of(base, v_row_, 4 * i + row));
    }
  }

  Lane lane_;
  const DecodeCall* call_;
  const DecodeEntry* entry_;
  std::uint32_t descriptors_;
  std::uint32_t ring_;
  std::uint32_t slot_;  // of the current stage
  int end_;
  int unit_;           // that is copied
  int current_;        // that is worked on
  int n_units_ = 0;    // copied so far, that one among them
  int n_current_ = 0;  // the same of those worked on
  Stage stage_ = {};
  KvFormat value_format_ = KvFormat::kRaw;
  // Of the unit that is copied, of the one after it, and of the one after that.
  std::uint32_t formats_ = 0;
  std::uint32_t k_row_ = 0;
  std::uint32_t v_row_ = 0;
  std::uint32_t row_bytes_ = 0;
  Found found_;
  Numbers numbers_;
};

}  // namespace spindle::kernels::device
