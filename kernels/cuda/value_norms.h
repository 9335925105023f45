#pragma once
// The two bodies of the product behind value_output_norms (kv_score.h): wgmma for compute
// capability 9.0, mma for any other. Apart only so that tests can run both on one device.

#include <cstddef>
#include <cstdint>

#include "kernels/core/tensor_view.h"
#include "kernels/kv_score.h"

namespace spindle::kernels {

enum class ValueNormsPath : std::uint8_t { kBest, kMma };

void value_output_norms(const CudaContext& context, const DeviceScoreLayer& layer,
                        const Bf16* output,  // [hidden, n_heads * head_dim]
                        std::int64_t hidden, std::int64_t first, std::byte* workspace,
                        std::size_t workspace_bytes, ValueNormsPath path, Rows norms);

}  // namespace spindle::kernels
