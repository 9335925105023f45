#pragma once
// How one KV head's tokens lie in memory once they left the full-precision tail: blocks of up to 32
// tokens, each side (K or V) in its own format. Shared by the codecs (kv_quant.h, codebook.h), by
// the attention that reads them (attention.h) and by the store that places them (kvstore/).
//
// A side of a block is two pieces of memory, `codes` and `scales`, because pieces of those sizes
// fill a page without gaps. head_dim must be a multiple of 32 for every format but kRaw.
//
// Codes of n bits lie in planes: 4 bits are one plane of nibbles, 2 bits one of bit pairs, 1 bit
// one of bits, 3 bits a plane of the two low bits followed by a plane of the high bit. K planes are
// d-major, [head_dim] groups of 32 tokens; V planes are token-major, [32] tokens of head_dim / 32
// groups of 32 channels. Element j of a group of 32:
//   nibbles (16 bytes)  byte j % 16, bits 4 (j / 16) ..
//   pairs   (8 bytes)   byte j % 8,  bits 2 (j / 8) ..
//   bits    (4 bytes)   bit j of the little-endian word
//
// Slots past the last token hold code 0 and scale 0 (raw: zeros), so decoding them is harmless.
//
// | format   | codes, bytes          | scales, bytes                                    |
// |----------|-----------------------|--------------------------------------------------|
// | kRaw     | capacity d element    | none; K is post-RoPE, d-major; V token-major      |
// | kInt4    | 16 d                  | 128: f16 scale [32], f16 min [32]; post-RoPE, rotated by the
// Hadamard matrix | | kKivi4   | 16 d                  | K: f16 scale [d], f16 min [d]; V: [d /
// 32][32] scale, then min | | kKivi2   | 8 d                   | as kKivi4 | | kLloyd1-4| 4 bits d
// | 64: f16 scale [32]; K pre-RoPE; minus mean, rotated | | kCodebook| 64: u16 entry [32]    | 64:
// f16 magnitude [32]; K pre-RoPE                | | kToken   | 64 or 128: token ids  | none; K
// pre-RoPE; V shares the ids of K           |

#include <cstddef>
#include <cstdint>

#include "kernels/core/dtype.h"

namespace spindle::kernels {

inline constexpr int kKvBlockTokens = 32;
// Codebook entries lie in chunks of this many.
inline constexpr int kCodebookChunkEntries = 16;

enum class KvFormat : std::uint8_t {
  kRaw,
  kInt4,
  kKivi4,
  kKivi2,
  kLloyd1,
  kLloyd2,
  kLloyd3,
  kLloyd4,
  kCodebook,
  kToken,
};

inline constexpr std::size_t kKvFormats = static_cast<std::size_t>(KvFormat::kToken) + 1;

enum class KvSide : std::uint8_t { kKey, kValue };

// Formats of the two sides of a head. kToken is for both sides or none.
struct KvCodec {
  KvFormat k = KvFormat::kRaw;
  KvFormat v = KvFormat::kRaw;
  bool operator==(const KvCodec&) const = default;
};

constexpr bool is_lloyd(KvFormat format) {
  return format >= KvFormat::kLloyd1 && format <= KvFormat::kLloyd4;
}
constexpr int lloyd_bits(KvFormat format) {
  return static_cast<int>(format) - static_cast<int>(KvFormat::kLloyd1) + 1;
}
// Whether K in this format is stored before RoPE and rotated at its token's position when read.
constexpr bool is_pre_rope(KvFormat format) {
  return is_lloyd(format) || format == KvFormat::kCodebook || format == KvFormat::kToken;
}
// Whether decoded values are in the basis rotated by the Hadamard matrix.
constexpr bool is_rotated(KvFormat format) { return is_lloyd(format) || format == KvFormat::kInt4; }

struct KvSideBytes {
  std::uint64_t codes = 0;
  std::uint64_t scales = 0;
  constexpr std::uint64_t total() const { return codes + scales; }
};

// Bytes of one side of a block; `capacity` counts for kRaw only, wide ids for kToken only.
constexpr KvSideBytes kv_side_bytes(KvFormat format, KvSide side, int head_dim, DType raw,
                                    int capacity = kKvBlockTokens, bool wide_ids = false) {
  const auto d = static_cast<std::uint64_t>(head_dim);
  switch (format) {
    case KvFormat::kRaw:
      return {d * static_cast<std::uint64_t>(capacity) * dtype_bytes(raw), 0};
    case KvFormat::kInt4:
      return {16 * d, 128};
    case KvFormat::kKivi4:
      return {16 * d, 4 * d};
    case KvFormat::kKivi2:
      return {8 * d, 4 * d};
    case KvFormat::kLloyd1:
    case KvFormat::kLloyd2:
    case KvFormat::kLloyd3:
    case KvFormat::kLloyd4:
      return {4 * static_cast<std::uint64_t>(lloyd_bits(format)) * d, 64};
    case KvFormat::kCodebook:
      return {64, 64};
    case KvFormat::kToken:
      return {side == KvSide::kKey ? (wide_ids ? 128U : 64U) : 0U, 0};
  }
  return {};
}

struct KvPieces {
  const std::byte* codes = nullptr;
  const std::byte* scales = nullptr;
};

// One block as the attention reads it. Tokens [first, end) of it are visible; blocks are in
// ascending order of positions, and all their tokens precede the tail.
struct KvBlock {
  KvCodec codec;
  std::uint8_t capacity = kKvBlockTokens;  // tokens the pieces are laid out for; < 32 for kRaw only
  std::uint8_t first = 0;
  std::uint8_t end = 0;
  std::int32_t first_position = 0;  // of slot 0, when `positions` is null: they are consecutive
  const std::byte* positions = nullptr;  // u16 or u32 [32], as KvHeadContext says
  KvPieces k;
  KvPieces v;
};

// What the blocks of one head refer to. Pointers that no block of the head needs may be null.
struct KvHeadContext {
  const std::uint16_t* k_mean = nullptr;  // f16 [d], before RoPE (lloyd)
  const std::uint16_t* v_mean = nullptr;  // f16 [d] (lloyd)
  // f16 vectors in chunks [kCodebookChunkEntries][d], most of length 1; entry e is in chunk e / 16.
  const std::byte* const* k_entries = nullptr;
  const std::byte* const* v_entries = nullptr;
  // Layer 0's table of this head: f16 row of token id t at t * token_stride elements.
  const std::uint16_t* k_tokens = nullptr;  // before RoPE
  const std::uint16_t* v_tokens = nullptr;
  std::int64_t token_stride = 0;
  bool wide_positions = false;  // u32 rather than u16
  bool wide_ids = false;        // u32 rather than u16
};

}  // namespace spindle::kernels
