#pragma once
// Codecs that store each token's K or V in a few bits: int4 with a Hadamard rotation, KIVI's
// per-channel K and per-token V in 4 and 2 bits, and Lloyd-Max levels of the normal distribution on
// centred, rotated vectors. Layouts are in kv_block.h.
//
// Sources: KIVI (arXiv 2402.02750); rotation before quantisation as in QuaRot (arXiv 2404.00456).
// Scales, minima and means are rounded to fp16 before codes are computed, and the rounded values
// are used in both directions. Rounding is to nearest even; a zero scale gives code 0; values
// beyond fp16 saturate, so that finite rows decode to finite rows.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <span>

#include "kernels/core/tensor_view.h"
#include "kernels/kv_block.h"

namespace spindle::kernels {

// x = x H / sqrt(n) in place, n = the largest power of two that divides x.size(), block by block;
// H[i][j] = (-1)^popcount(i & j). It is its own inverse.
void hadamard(std::span<float> x);

// The fp16 mean of each column, summed in fp32 pairs of rows in ascending order. With no rows, 0.
void kv_mean(ConstRows x, std::span<std::uint16_t> mean);

// Levels of Lloyd-Max quantisation of N(0, 1), ascending, [2^bits], bits 1 to 4.
std::span<const float> lloyd_levels(int bits);

// Encodes x [n <= 32, d] into the pieces of one side; slots past n are filled as kv_block.h says.
// `format` is kInt4, kKivi4, kKivi2 or kLloyd1-4. K rows are post-RoPE or pre-RoPE as the format
// wants. `mean` (f16 [d]) is used by lloyd only. KIVI's K needs n == 32: its groups are 32 tokens.
void kv_encode(KvFormat format, KvSide side, ConstRows x, std::span<const std::uint16_t> mean,
               std::byte* codes, std::byte* scales);

// The oracle: the first out.n_rows tokens of the pieces, in the plain basis with the mean added
// (K of a pre-RoPE format before RoPE).
void kv_decode(KvFormat format, KvSide side, KvPieces pieces, std::span<const std::uint16_t> mean,
               Rows out);

}  // namespace spindle::kernels
