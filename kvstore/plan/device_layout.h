#pragma once
// Which models' KV and attention the CUDA bodies know; asked when a stage starts on a GPU, and by
// whoever plans one.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <string>

#include "kernels/core/status.h"
#include "kvstore/plan/kv_shape.h"

namespace spindle::kvstore {

// Places in a pool are counted in 64 bytes by 32 bits.
inline constexpr std::uint64_t kMostDevicePoolBytes = 256ULL << 30;

// UNIMPLEMENTED, naming what is not known.
inline Status check_device_layout(const KvShape& shape) {
  if ((shape.head_dim == 64 || shape.head_dim == 128) &&
      (shape.dtype == DType::kF16 || shape.dtype == DType::kBF16)) {
    return ok_status();
  }
  return unimplemented("KV on a CUDA device is of head_dim 64 or 128 in 16 bits, not " +
                       std::to_string(shape.head_dim) + " in " +
                       std::to_string(8 * dtype_bytes(shape.dtype)));
}

// The same for n_heads query heads over the KV heads.
inline Status check_device_heads(const KvShape& shape, int n_heads) {
  const int group = n_heads / shape.n_kv_heads;
  if (group <= 8 || group % 8 == 0) return ok_status();
  return unimplemented(std::to_string(group) +
                       " query heads for a KV head: the CUDA kernels take up to 8, or a multiple");
}

}  // namespace spindle::kvstore
