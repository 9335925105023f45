#pragma once
// Token ids to rows of the embedding table.

#include <cstdint>
#include <span>

#include "kernels/core/cpu_context.h"
#include "kernels/core/dtype.h"
#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// Borrowed; the file's own bytes will do, 16-bit types need 2-byte alignment.
struct EmbeddingTable {
  const void* data = nullptr;  // [n_vocab, hidden] row-major
  DType dtype = DType::kF32;
  std::int64_t n_vocab = 0;
  std::int64_t hidden = 0;
};

// out[i] = table[ids[i]], widened exactly. Ids must be in [0, n_vocab): whoever accepts ids from
// outside checks them first.
void embedding(const CpuContext& context, const EmbeddingTable& table,
               std::span<const std::int32_t> ids,  // [n_tokens]
               Rows out);                          // [n_tokens, hidden]

// CUDA body: the table, ids and out are device memory. An id outside the table gives a row of NaN:
// the token -1 of a failed sample() that is fed to the next step without the host ends as -1 again.
void embedding(const CudaContext& context, const EmbeddingTable& table,
               const std::int32_t* ids,  // [out.n_rows]
               Rows out);                // [n_tokens, hidden]

// out[i] = rows[index[i]], for the rows whose logits are wanted; device memory. An index outside
// gives a row of NaN.
void gather_rows(const CudaContext& context, ConstRows rows, const std::int32_t* index,
                 Rows out);  // [n, width]

}  // namespace spindle::kernels
