#pragma once
// Attention over caches in each format of kv_block.h, beside the full-precision cache.

#include "kernels/core/cpu_context.h"

namespace spindle::kernels {

void bench_kv_attention(const CpuContext& context);

}  // namespace spindle::kernels
