#pragma once
// The library matrix product that our linear operation is measured against in the same run.

#include <cstdint>
#include <functional>

namespace spindle::kernels {

// A call that multiplies x [m, k] by pre-packed f32 weights [n, k] on one thread; empty when the
// build has no such library.
std::function<void()> onednn_f32_product(std::int64_t m, std::int64_t n, std::int64_t k);

}  // namespace spindle::kernels
