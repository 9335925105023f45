#include <cuda_runtime.h>

#include "kernels/core/check.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kvstore/table_writes.h"

namespace spindle::kvstore {
namespace {

constexpr unsigned kWarps = 8;  // of a block; one write each

__global__ void __launch_bounds__(32 * kWarps)
    write_kernel(const TableWrite* writes, unsigned n_writes, const std::uint32_t* words) {
  const unsigned index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= n_writes) return;
  const TableWrite write = writes[index];
  for (std::uint32_t i = threadIdx.x % 32; i < write.n_words; i += 32) {
    write.target[i] = words[write.first_word + i];
  }
}

}  // namespace

void write_tables(const CudaContext& context, const TableWrite* writes, int n_writes,
                  const std::uint32_t* words) {
  CHECK(n_writes >= 0, "write_tables count");
  if (n_writes == 0) return;
  const unsigned n = static_cast<unsigned>(n_writes);
  write_kernel<<<(n + kWarps - 1) / kWarps, 32 * kWarps, 0, context.stream()>>>(writes, n, words);
  check_launch("write_tables");
}

}  // namespace spindle::kvstore
