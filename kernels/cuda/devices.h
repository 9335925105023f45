#pragma once
// The CUDA devices of this host. In a build without CUDA there are none.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::kernels {

struct CudaDevice {
  int index = 0;
  std::string name;            // "NVIDIA H200"
  int compute_capability = 0;  // 90 for 9.0
  int n_multiprocessors = 0;
  std::uint64_t total_bytes = 0;
  std::string unique_id;  // 16 bytes; the same in every process
  // Peak of its memory, from clock and bus width: the same at every start. 0: not known.
  std::uint64_t memory_bytes_per_second = 0;
};

// Empty without a driver or a device; UNAVAILABLE when the driver fails in another way.
// Thread-safety: may be called from any thread.
Result<std::vector<CudaDevice>> list_cuda_devices();

}  // namespace spindle::kernels
