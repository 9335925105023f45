#pragma once
// The gate of a Llama-style feed-forward block.

#include "kernels/core/cpu_context.h"
#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// out = silu(gate) * up, with gate the first and up the second half of each row of the fused
// projection; silu(x) = x / (1 + exp(-x)). `out` must not overlap `gate_up`.
void swiglu(const CpuContext& context,
            ConstRows gate_up,  // [n_tokens, 2 * inter]
            Rows out);          // [n_tokens, inter]

// CUDA body, on device memory; silu in fp32, rounded once.
void swiglu(const CudaContext& context,
            ConstRows gate_up,  // [n_tokens, 2 * inter]
            Bf16Rows out);      // [n_tokens, inter]

}  // namespace spindle::kernels
