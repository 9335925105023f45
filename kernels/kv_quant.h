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
#include "kernels/cuda/kv_device.h"
#include "kernels/kv_block.h"
#include "kernels/rope.h"

namespace spindle {
class CudaContext;
}

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

// ---- CUDA bodies. Everything a boundary of one layer encodes goes in few launches; all pointers
// are device memory.

// Tokens of one head's tail that are encoded: K rows are gathered from the pages, and also turned
// back to before RoPE (rounded to f16 as kv_unrotate does), into f16 rows [n_tokens][head_dim],
// which are 16-byte aligned. Values beyond f16 saturate. rotary_dim is a multiple of 16.
struct DeviceGather {
  const std::uint32_t* pages = nullptr;  // the tail's page numbers
  std::int32_t tail_origin = 0;
  std::int32_t n_tokens = 0;
  // [n_tokens], ascending, all in the tail; null: consecutive from first_position on.
  const std::int32_t* positions = nullptr;
  F16* k = nullptr;      // after RoPE; null: not wanted
  F16* k_pre = nullptr;  // before RoPE; null: not wanted
  F16* v = nullptr;      // null: not wanted
  std::int32_t first_position = 0;
};
void kv_gather(const CudaContext& context, const std::byte* pool, DType dtype, int head_dim,
               const DeviceRope& rope, const DeviceGather* gathers, int n_gathers,
               std::int32_t max_tokens);

// The f16 mean of each column of f16 rows (16-byte aligned), in the order of the CPU body.
struct DeviceMean {
  const F16* rows = nullptr;  // [n][head_dim]
  std::int32_t n = 0;
  std::uint16_t* mean = nullptr;  // [head_dim]
};
void kv_mean(const CudaContext& context, int head_dim, const DeviceMean* means, int n_means);

// One side of one block. `rows` are [n][head_dim] (K before or after RoPE as the format wants);
// rows and mean are 16-byte aligned.
struct DeviceEncode {
  const F16* rows = nullptr;
  const std::uint16_t* mean = nullptr;  // lloyd
  std::byte* codes = nullptr;           // 16-byte aligned, order of kv_device.h
  std::byte* scales = nullptr;
  KvFormat format = KvFormat::kRaw;  // every format but kCodebook and kToken
  KvSide side = KvSide::kKey;
  std::uint8_t n = 0;
  std::uint8_t capacity = kKvBlockTokens;  // kRaw
};
// `raw` is the type of kRaw pieces. Codes and scales equal the CPU body's on the same rows.
void kv_encode(const CudaContext& context, int head_dim, DType raw, const DeviceEncode* blocks,
               int n_blocks);

}  // namespace spindle::kernels
