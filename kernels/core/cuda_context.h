#pragma once
// CudaContext: where CUDA kernels of one rank run. One device, one compute stream, one cuBLASLt
// handle with a fixed workspace, and the one place that allocates device and pinned memory.
//
// Host-only: the CUDA types are forward declared, so that headers of operations can name it.
//
// Order: every operation with a context is enqueued on its stream and returns at once; results are
// visible to later work on the stream. Operations never allocate or synchronise. Allocation and
// release are ordered on the stream too (cudaMallocAsync), so memory may be released right after
// the last launch that uses it.
//
// Errors: running out of memory is a Status; everything else that CUDA reports is thrown as
// CudaError (cuda_check.h).
//
// Thread-safety: one thread at a time; the stage's thread owns it. Several contexts, on one device
// or many, are independent.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/core/status.h"

struct CUstream_st;
struct cublasLtContext;

namespace spindle {

using CudaStream = CUstream_st*;

class CudaContext;

// Device memory. Move-only; released on the context's stream, so the context outlives it.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        n_bytes_(std::exchange(other.n_bytes_, 0)),
        stream_(other.stream_) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer();

  std::byte* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::size_t n_bytes() const { return n_bytes_; }

 private:
  friend class CudaContext;
  DeviceBuffer(std::byte* data, std::size_t n_bytes, CudaStream stream)
      : data_(data), n_bytes_(n_bytes), stream_(stream) {}

  std::byte* data_ = nullptr;
  std::size_t n_bytes_ = 0;
  CudaStream stream_ = nullptr;
};

// Page-locked host memory, for copies that overlap with the host's work. Move-only.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(PinnedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), n_bytes_(std::exchange(other.n_bytes_, 0)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer();

  std::byte* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::size_t n_bytes() const { return n_bytes_; }

 private:
  friend class CudaContext;
  PinnedBuffer(std::byte* data, std::size_t n_bytes) : data_(data), n_bytes_(n_bytes) {}

  std::byte* data_ = nullptr;
  std::size_t n_bytes_ = 0;
};

class CudaContext {
 public:
  // NOT_FOUND when there is no such device, UNAVAILABLE when it cannot be used (too old, no
  // driver).
  static Result<std::unique_ptr<CudaContext>> create(int device);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  int device() const { return device_; }
  const std::string& device_name() const { return device_name_; }
  // Names the physical device across processes and hosts.
  const std::string& unique_id() const { return unique_id_; }
  std::uint64_t total_bytes() const { return total_bytes_; }
  int compute_capability() const { return compute_capability_; }  // 90 for 9.0
  int n_multiprocessors() const { return n_multiprocessors_; }
  int shared_bytes_per_block() const { return shared_bytes_per_block_; }  // opt-in limit
  CudaStream stream() const { return stream_; }
  cublasLtContext* blas() const { return blas_; }
  // Workspace of cuBLASLt calls on the stream; fixed, so that calls can be captured in a graph.
  std::byte* blas_workspace() const { return blas_workspace_.data(); }
  std::size_t blas_workspace_bytes() const { return blas_workspace_.n_bytes(); }

  // Uninitialised memory, aligned to 256 bytes. RESOURCE_EXHAUSTED with sizes and `what` when the
  // device has not enough.
  Result<DeviceBuffer> allocate(std::size_t n_bytes, std::string_view what) const;
  Result<PinnedBuffer> allocate_pinned(std::size_t n_bytes, std::string_view what) const;
  // Device memory not in use by any process.
  std::uint64_t free_bytes() const;

  // Stream-ordered copies. `source` of to_device must stay valid until the copy ran, unless it is
  // pageable memory, which CUDA copies before it returns.
  void to_device(void* target, const void* source, std::size_t n_bytes) const;
  void to_host(void* target, const void* source, std::size_t n_bytes) const;
  void copy(void* target, const void* source, std::size_t n_bytes) const;
  void fill(void* target, int value, std::size_t n_bytes) const;
  // Waits for everything on the stream. The wait ends when the device fails.
  void synchronize() const;

 private:
  CudaContext() = default;

  int device_ = 0;
  std::string device_name_;
  std::string unique_id_;
  std::uint64_t total_bytes_ = 0;
  int compute_capability_ = 0;
  int n_multiprocessors_ = 0;
  int shared_bytes_per_block_ = 0;
  CudaStream stream_ = nullptr;
  cublasLtContext* blas_ = nullptr;
  DeviceBuffer blas_workspace_;
};

}  // namespace spindle
