#pragma once
// How KV lies in device memory, and the tables by which kernels find it. Plain structs, shared by
// host code that fills them (kvstore/) and by the kernels that read them.
//
// Page: as in attention.h one kv head of one layer for 32 tokens, K then V, but arranged so that 16
// bytes per lane are what an mma fragment of that lane needs:
//   K  [head_dim / 32][32 tokens][32 channels]
//   V  [head_dim][32 tokens]
// A raw block of a smaller capacity c replaces 32 tokens by c: K [head_dim / 32][c][32], V
// [head_dim][c].
// Codes of coded blocks have the planes and sizes of kv_block.h with another order of elements,
// kv_code_element() below. Scales, ids, refs, magnitudes, positions and codebook entries are as in
// kv_block.h. head_dim is 64 or 128.
//
// A place in the pool is its distance from the pool's base in units of 64 bytes, the alignment of
// every piece: 32 bits reach 256 GiB.

#include <cstddef>
#include <cstdint>

#include "kernels/kv_block.h"

#if defined(__CUDACC__)
#define SPINDLE_HOST_DEVICE __host__ __device__
#else
#define SPINDLE_HOST_DEVICE
#endif

namespace spindle::kernels {

inline constexpr std::uint32_t kKvPlaceBytes = 64;
inline constexpr std::uint32_t kNoPlace = 0xffffffffU;

struct DeviceKvBlock {
  std::uint32_t k_codes = kNoPlace;
  std::uint32_t k_scales = kNoPlace;
  std::uint32_t v_codes = kNoPlace;
  std::uint32_t v_scales = kNoPlace;
  std::uint32_t positions = kNoPlace;  // u16 or u32 [32]; kNoPlace: consecutive
  // Of slot 0 when positions are consecutive. When they are listed, the first visible slot's, from
  // which keys before RoPE are turned; -1 or one that is too far below others costs time only.
  std::int32_t first_position = 0;
  KvFormat k_format = KvFormat::kRaw;
  KvFormat v_format = KvFormat::kRaw;
  std::uint8_t first = 0;  // tokens [first, end) are visible
  std::uint8_t end = 0;
  std::uint8_t capacity = kKvBlockTokens;  // a multiple of 4
  std::uint8_t reserved[3] = {};
};
static_assert(sizeof(DeviceKvBlock) == 32);

// One kv head of one sequence, KvHeadPages with device tables. Page i of the tail holds the
// positions [tail_origin + 32 i, tail_origin + 32 (i + 1)); those below tail_first are not visible.
struct DeviceKvHead {
  const std::uint32_t* pages = nullptr;   // page numbers of the tail
  const DeviceKvBlock* blocks = nullptr;  // aligned to 8 bytes
  std::int32_t n_blocks = 0;
  std::int32_t tail_origin = 0;
  std::int32_t tail_first = 0;
  std::uint32_t k_mean = kNoPlace;  // f16 [d]
  std::uint32_t v_mean = kNoPlace;  // f16 [d]
  std::uint8_t wide_positions = 0;
  std::uint8_t wide_ids = 0;
  std::uint8_t reserved[2] = {};
  const std::uint32_t* k_entries = nullptr;  // places of the codebook's chunks [16][d]
  const std::uint32_t* v_entries = nullptr;
  const std::uint16_t* k_tokens = nullptr;  // f16, row of id t at t * token_stride; before RoPE
  const std::uint16_t* v_tokens = nullptr;
  std::int64_t token_stride = 0;
};
static_assert(sizeof(DeviceKvHead) == 80);

// One sequence of a step. Query j is at position n_context - n_queries + j.
struct DeviceSequence {
  std::int32_t query_begin = 0;  // first row in q and out
  std::int32_t n_queries = 0;    // 0: a padding entry, nothing is read or written for it
  std::int32_t n_context = 0;    // positions in the cache, the queries' own included
  std::int32_t reserved = 0;
  const DeviceKvHead* heads = nullptr;  // [n_layers][n_kv_heads]
};
static_assert(sizeof(DeviceSequence) == 24);

// Formats that the blocks of a launch of decode attention may have: a kernel that knows them is
// faster. Pages and raw blocks are always allowed.
enum class DecodeFormats : std::uint8_t {
  kRaw,
  kInt4,
  kLloyd,  // 1 to 4 bits
  kKivi,   // 4 and 2 bits
  kRows,   // token ids and codebooks
  kAll,
};
// The narrowest set for a mask of 1 << KvFormat.
constexpr DecodeFormats decode_formats(std::uint32_t format_mask) {
  constexpr auto kBit = [](KvFormat format) { return 1U << static_cast<unsigned>(format); };
  const std::uint32_t coded = format_mask & ~kBit(KvFormat::kRaw);
  const auto only = [coded](std::uint32_t allowed) { return (coded & ~allowed) == 0; };
  if (only(0)) return DecodeFormats::kRaw;
  if (only(kBit(KvFormat::kInt4))) return DecodeFormats::kInt4;
  if (only(kBit(KvFormat::kLloyd1) | kBit(KvFormat::kLloyd2) | kBit(KvFormat::kLloyd3) |
           kBit(KvFormat::kLloyd4))) {
    return DecodeFormats::kLloyd;
  }
  if (only(kBit(KvFormat::kKivi4) | kBit(KvFormat::kKivi2))) return DecodeFormats::kKivi;
  if (only(kBit(KvFormat::kToken) | kBit(KvFormat::kCodebook))) return DecodeFormats::kRows;
  return DecodeFormats::kAll;
}

// Where an element lies: code number `index` of 32-bit word `word` of a side's plane.
struct KvElement {
  int token = 0;
  int channel = 0;
};

// Codes of n bits: nibbles, pairs or bits; a plane is 4, 2 or 1 bits per code. Code i of a word is
// at bit positions [i * bits, (i + 1) * bits); codes i and i + n/2 (n = 32 / bits codes a word) are
// neighbours that one shift and one mask turn into a pair of 16-bit values.
//
// Lane (g, q) = (lane / 4, lane % 4) owns, for K, the channels 32 j + 8 q + 0..7 of the four tokens
// 8 (g / 2) + 4 t + 2 h + g % 2 (t, h in 0, 1): the rows g and g + 8 of two 16-row tiles of an
// mma.m16n8k16 whose A operand is K [token, channel]; and for V the tokens 8 q + 0..7 of the
// channels 16 m + 8 x + g: rows of A = V^T [channel, token].
// A lane's words lie together in chunks of 16 bytes (8 for planes of 1 bit at head_dim 64), one
// chunk of every lane behind the other.
SPINDLE_HOST_DEVICE constexpr KvElement kv_code_element(KvSide side, int bits, int head_dim,
                                                        int word, int index) {
  const int words_per_lane = bits * head_dim / 32;  // 2, 4, 8 or 16
  const int chunk_words = words_per_lane < 4 ? words_per_lane : 4;
  const int lane = word / chunk_words % 32;
  // Word of the lane's own, over all chunks.
  const int own = word / (32 * chunk_words) * chunk_words + word % chunk_words;
  const int g = lane / 4;
  const int q = lane % 4;
  const int half = 16 / bits;     // pairs in a word
  const int pair = index % half;  // of neighbours
  const int odd = index / half;   // which of the two
  if (side == KvSide::kKey) {
    // Per lane: pairs are ordered [j][t][h][4 channel pairs]; words hold them in these groupings.
    int j = 0;
    int t = 0;
    int h = 0;
    int channel_pair = pair % 4;
    if (bits == 4) {  // word: one token, one j; chunk: one j
      j = own / 4;
      t = own / 2 % 2;
      h = own % 2;
    } else if (bits == 2) {  // word: one token, two j; chunk: two j
      j = own / 4 * 2 + pair / 4;
      t = own / 2 % 2;
      h = own % 2;
    } else {  // word: two tokens (h), two j; chunk: head_dim 64 [t], head_dim 128 [j / 2][t]
      j = own / 2 * 2 + pair / 4 % 2;
      t = own % 2;
      h = pair / 8;
    }
    return {8 * (g / 2) + 4 * t + 2 * h + g % 2, 32 * j + 8 * q + 2 * channel_pair + odd};
  }
  // V. A word holds 1, 2 or 4 of the lane's channels, ordered by 2 m + x, and four token pairs.
  const int channels_per_word = half / 4;
  const int mx = own * channels_per_word + pair / 4;
  return {8 * q + 2 * (pair % 4) + odd, 16 * (mx / 2) + 8 * (mx % 2) + g};
}

}  // namespace spindle::kernels
