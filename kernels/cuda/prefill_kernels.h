#pragma once
// attention_prefill has two kernels; it takes the faster one that the device has. Tests and
// benchmarks name one.

#include <cstdint>
#include <span>

#include "kernels/attention.h"

namespace spindle::kernels {

enum class PrefillKernel : std::uint8_t {
  kMma,    // mma.sync, every supported device
  kWgmma,  // wgmma and the tensor copy engine, compute capability 9.0
};

PrefillKernel best_prefill_kernel(const CudaContext& context);

// As attention_prefill (attention.h). The device must have `kernel`.
void attention_prefill_with(PrefillKernel kernel, const CudaContext& context, ConstF16Rows q,
                            std::span<const std::int32_t> n_queries,
                            const DeviceSequence* sequences, int layer, const AttentionShape& shape,
                            const DeviceKvPool& pool, float scale,
                            const DeviceExpandedBlocks& expanded, Bf16Rows out);

}  // namespace spindle::kernels
