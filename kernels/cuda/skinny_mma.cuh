#pragma once
// What the kernels for products with few rows of x share: copies to shared memory, the mma, the
// stores.
//
// Rows of W are the rows (16) of mma.m16n8k16, tokens its columns (8). Lane (g, q) = (lane / 4,
// lane % 4) of a warp needs of a step of 32 columns only its own 16 bytes of the rows g and g + 8
// and of token g: the columns 8 q + 0..7, which are taken as the columns 2 q, 2 q + 1, 2 q + 8,
// 2 q + 9 of two mma in both operands. Its sums are those of row g and of row g + 8, for the tokens
// 2 q and 2 q + 1. With kSwiglu the rows g are gates and the rows g + 8 the values they gate.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/skinny_linear.h"

namespace spindle::kernels {

inline constexpr int kSkinnyWarps = 8;
inline constexpr int kSkinnyThreads = 32 * kSkinnyWarps;
inline constexpr int kStepColumns = 32;
inline constexpr int kChunkBytes = 16;          // of one lane in one row and step
inline constexpr int kHalfTileBytes = 32 * 16;  // one chunk of every lane: 8 rows of a step
inline constexpr int kTokenStepBytes = 4 * 16;  // one token's columns of a step

// Rows of W in a tile of 16: [first, first + 8) and their twins `second` rows further on, none
// beyond the last.
struct SkinnyRows {
  const std::uint16_t* weights;
  std::int64_t n_in;
  std::int64_t second;      // 8; kSwiglu: inter
  std::int64_t last_upper;  // row that has an upper half
  std::int64_t last_lower;

  __device__ const std::uint16_t* upper(std::int64_t row) const {
    return weights + min(row, last_upper) * n_in;
  }
  __device__ const std::uint16_t* lower(std::int64_t row) const {
    return weights + min(row + second, last_lower) * n_in;
  }
};

struct SkinnyTarget {
  void* y;
  std::int64_t y_stride;
  std::int64_t n_first;  // outputs: n_out; kSwiglu: inter
};

inline SkinnyRows skinny_rows(LinearOutput output, const SkinnyProduct& product) {
  const bool swiglu = output == LinearOutput::kSwiglu;
  const std::int64_t last = product.n_out - 1;
  return {&product.weights->bits, product.n_in, swiglu ? product.n_out / 2 : 8,
          swiglu ? product.n_out / 2 - 1 : last, last};
}
inline SkinnyTarget skinny_target(LinearOutput output, const SkinnyProduct& product) {
  return {product.y, product.y_stride,
          output == LinearOutput::kSwiglu ? product.n_out / 2 : product.n_out};
}

__device__ inline void copy_async_weights(std::uint32_t target, const void* source, int n_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(n_bytes)
               : "memory");
}
__device__ inline void copy_async_tokens(std::uint32_t target, const void* source, int n_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(n_bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void multiply(float (&sum)[4], std::uint32_t a0, std::uint32_t a1,
                                std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <LinearOutput kOutput>
__device__ void store_pair(const SkinnyTarget& a, std::int64_t row, std::int64_t token, float upper,
                           float lower, float2 residual) {
  const std::int64_t at = token * a.y_stride + row;
  if constexpr (kOutput == LinearOutput::kSwiglu) {
    if (row >= a.n_first) return;
    const float value = upper / (1.0F + __expf(-upper)) * lower;
    static_cast<__nv_bfloat16*>(a.y)[at] = __float2bfloat16_rn(value);
  } else if constexpr (kOutput == LinearOutput::kBf16) {
    auto* y = static_cast<__nv_bfloat16*>(a.y);
    if (row < a.n_first) y[at] = __float2bfloat16_rn(upper);
    if (row + 8 < a.n_first) y[at + 8] = __float2bfloat16_rn(lower);
  } else {
    auto* y = static_cast<float*>(a.y);
    if (row < a.n_first) y[at] = residual.x + upper;
    if (row + 8 < a.n_first) y[at + 8] = residual.y + lower;
  }
}

// What is there of a pair of outputs before the product is added.
template <LinearOutput kOutput>
__device__ float2 residual_pair(const SkinnyTarget& a, std::int64_t row, std::int64_t token) {
  float2 out = make_float2(0.0F, 0.0F);
  if constexpr (kOutput == LinearOutput::kAddF32) {
    const float* y = static_cast<const float*>(a.y) + token * a.y_stride + row;
    if (row < a.n_first) out.x = y[0];
    if (row + 8 < a.n_first) out.y = y[8];
  }
  return out;
}

// A multiprocessor has 1 KiB more than a block may ask for, and every block takes 1 KiB beside.
inline int bytes_for_blocks(const CudaContext& context, int n_blocks) {
  constexpr int kReservedBytes = 1024;
  return (context.shared_bytes_per_block() + kReservedBytes) / n_blocks - kReservedBytes;
}

}  // namespace spindle::kernels
