#pragma once
// RMSNorm as Hugging Face's LlamaRMSNorm in fp32: out = weight * (x / sqrt(mean(x^2) + eps)).

#include <span>

#include "kernels/core/cpu_context.h"
#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// `out` may be `x` itself.
void rms_norm(const CpuContext& context,
              ConstRows x,                    // [n_tokens, hidden]
              std::span<const float> weight,  // [hidden]
              float eps,
              Rows out);  // [n_tokens, hidden]

// residual += x, then out = rms_norm(residual). `out` may be `x` but not `residual`. Bitwise equal
// to residual_add followed by rms_norm.
void add_rms_norm(const CpuContext& context,
                  ConstRows x,                    // [n_tokens, hidden]
                  Rows residual,                  // [n_tokens, hidden]
                  std::span<const float> weight,  // [hidden]
                  float eps,
                  Rows out);  // [n_tokens, hidden]

// residual += x.
void residual_add(const CpuContext& context,
                  ConstRows x,     // [n_tokens, hidden]
                  Rows residual);  // [n_tokens, hidden]

// CUDA body: x, weight and out are device memory. Sums in fp32. The residual stream is fp32; what
// goes into a matrix product is bf16. (The residual is added by the product itself, linear.h.)
void rms_norm(const CudaContext& context,
              ConstRows x,          // [n_tokens, hidden]
              const float* weight,  // [hidden]
              float eps,
              Bf16Rows out);  // [n_tokens, hidden]

}  // namespace spindle::kernels
