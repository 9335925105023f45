#pragma once
// Moving tokens out of the full-precision tail: gathering rows from pages, undoing RoPE, and
// writing raw blocks.
//
// Thread-safety: pure functions; CpuContext's rule.

#include <cstdint>
#include <span>

#include "kernels/attention.h"
#include "kernels/core/cpu_context.h"
#include "kernels/core/tensor_view.h"
#include "kernels/rope.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// Rows of the tokens at `positions` (ascending, all inside the tail that begins at tail_origin).
void kv_gather(const CpuContext& context, const std::byte* const* pages, std::int64_t tail_origin,
               std::span<const std::int32_t> positions, const KvPageLayout& layout,
               Rows k,   // [n, head_dim]
               Rows v);  // [n, head_dim]

// In place: keys after RoPE back to before it, each at its position, rounded to f16. The rotation
// is orthogonal up to attention_scale, which is divided out.
void kv_unrotate(const RopeTable& rope, std::span<const std::int32_t> positions,
                 Rows k);  // [n, head_dim]

// Rows to a raw side of a block: K d-major [head_dim][capacity], V token-major
// [capacity][head_dim], rounded to the layout's type; slots past n are zeros.
void kv_write_raw(KvSide side, ConstRows x, int capacity, const KvPageLayout& layout,
                  std::byte* codes);

// CUDA: many small copies in one launch; device memory, 16-byte aligned sizes and addresses, no
// overlap between any source and any target.
struct DeviceCopy {
  const std::byte* source = nullptr;  // null: zeros
  std::byte* target = nullptr;
  std::uint64_t n_bytes = 0;
};
void kv_copy(const CudaContext& context, const DeviceCopy* copies, int n_copies);

}  // namespace spindle::kernels
