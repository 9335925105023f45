#pragma once
// The rates of this machine that benchmarks are held against, taken in the same run.

#include <cstddef>
#include <cstdint>
#include <functional>

namespace spindle::kernels {

// Seconds of the fastest of many calls within about 0.3 s, in CPU time of this thread: time slices
// given to others do not count.
double best_seconds(const std::function<void()>& call);

// The rate at which one thread reads a buffer of `bytes`, in GB/s. The search for a byte that is
// not there is the fastest reader in the C library.
double read_bandwidth(std::size_t bytes);

// A call that multiplies x [m, k] by pre-packed f32 weights [n, k] on one thread with a library;
// empty when the build has no such library.
std::function<void()> onednn_f32_product(std::int64_t m, std::int64_t n, std::int64_t k);

}  // namespace spindle::kernels
