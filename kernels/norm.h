#pragma once
// RMSNorm as Hugging Face's LlamaRMSNorm in fp32: out = weight * (x / sqrt(mean(x^2) + eps)).

#include <span>

#include "kernels/core/cpu_context.h"
#include "kernels/core/tensor_view.h"

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

}  // namespace spindle::kernels
