#pragma once
// Fills device memory with random numbers.

#include "kernels/bench/cuda/bench.h"

namespace spindle::bench {

void random_fill(const CudaContext& context, std::byte* data, std::size_t n_bytes, Bench::Fill fill,
                 std::uint64_t seed);

}  // namespace spindle::bench
