#pragma once
// Tensors in host memory, as they came from a file.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/core/status.h"

namespace spindle::model {

// Owned memory that begins on a 64-byte boundary (a cache line, an AVX-512 register).
//
// Thread-safety: plain memory.
class AlignedBuffer {
 public:
  static constexpr std::size_t kAlignmentBytes = 64;

  AlignedBuffer() = default;
  // Contents are indeterminate. kResourceExhausted when memory cannot be had.
  static Result<AlignedBuffer> allocate(std::size_t n_bytes);

  std::span<std::byte> bytes() { return {memory_.get(), n_bytes_}; }
  std::span<const std::byte> bytes() const { return {memory_.get(), n_bytes_}; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };

  std::unique_ptr<std::byte[], Free> memory_;
  std::size_t n_bytes_ = 0;
};

// A row-major tensor. Invariant: data holds exactly shape product x dtype_bytes(dtype) bytes.
//
// Thread-safety: plain memory; may be read by many threads while nobody writes.
struct HostTensor {
  DType dtype = DType::kBF16;
  std::vector<std::int64_t> shape;
  AlignedBuffer data;

  std::int64_t n_elements() const;
  // Element `i` widened to fp32; for tests and small tools, not for hot loops.
  float at(std::int64_t i) const;
};

// Allocates a tensor; kInvalidArgument when a size is negative or the product overflows.
Result<HostTensor> make_host_tensor(DType dtype, std::vector<std::int64_t> shape);

}  // namespace spindle::model
