#pragma once
// Rounding rows to another element type on a device.

#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// out = x rounded to f16, to nearest even; device memory.
void convert(const CudaContext& context, ConstRows x, F16Rows out);

}  // namespace spindle::kernels
