#pragma once
// From a context to the kernels of its instruction set, and the scratch those kernels need.

#include "kernels/core/cpu_context.h"
#include "kernels/core/dtype.h"
#include "kernels/isa/kernel_table.h"

namespace spindle::kernels {

// Immutable tables, one per instruction set.
const KernelTable& kernels_for(const CpuContext& context);

// How a KV page stores elements of a type.
ElementFormat page_format(DType dtype);

}  // namespace spindle::kernels
