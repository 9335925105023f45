#pragma once
// Between linear_cuda_host.cc, linear_cuda.cu and linear_resident_cuda.cu: products with few rows
// of x, in which each weight is read once and the time is that of reading the weights.

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/core/cuda_context.h"
#include "kernels/core/dtype.h"

namespace spindle::kernels {

enum class LinearOutput : std::uint8_t { kBf16, kF32, kAddF32, kSwiglu };
inline constexpr int kLinearOutputs = 4;

struct SkinnyProduct {
  const Bf16* weights = nullptr;  // [n_out, n_in]
  std::int64_t n_out = 0;         // kSwiglu: 2 * inter
  std::int64_t n_in = 0;          // a multiple of 8
  const Bf16* x = nullptr;        // rows start at multiples of 16 bytes
  std::int64_t x_stride = 0;
  int n_tokens = 0;
  void* y = nullptr;  // Bf16 or float
  std::int64_t y_stride = 0;
};

// Shapes of the kernel that tune_linear() lets compete, for up to 16 tokens.
inline constexpr int kSkinnyVariants = 7;
// Without tuning, up to so many tokens.
inline constexpr int kSkinnyDefaultTokens = 8;

// Lets the kernels use the shared memory they need; once per device before the first call.
void prepare_skinny_linear(const CudaContext& context);
bool skinny_fits(const CudaContext& context, int variant, int n_tokens);
// What runs without tuning; -1 for too many tokens.
int skinny_default(const CudaContext& context, int n_tokens);
// "own 16x8, 6 stages": rows of W and tokens of a tile.
std::string skinny_name(int variant);
void skinny_linear(const CudaContext& context, LinearOutput output, int variant,
                   const SkinnyProduct& product);

// The last variant, of linear_resident_cuda.cu, whatever the number of columns.
inline constexpr int kResidentVariant = kSkinnyVariants - 1;
inline constexpr int kResidentTokens = 16;
void prepare_resident_linear(const CudaContext& context);
bool resident_fits(const CudaContext& context, int n_tokens);
void resident_linear(const CudaContext& context, LinearOutput output, const SkinnyProduct& product);

// out[i] = source[i] rounded to nearest even; `source` is float or F16.
void round_to_bf16(const CudaContext& context, const void* source, DType dtype, std::int64_t n,
                   Bf16* out);
// Values in [-1, 1) for timing.
void fill_for_tuning(const CudaContext& context, Bf16* out, std::int64_t n);

}  // namespace spindle::kernels
