#include "kernels/core/cuda_context.h"

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstdio>

#include "kernels/core/cuda_check.h"

namespace spindle {
namespace {

constexpr std::size_t kBlasWorkspaceBytes = std::size_t{32} << 20;
constexpr int kMinComputeCapability = 80;

// Destructors cannot throw: a failed release is logged, and the next call on the device fails too.
void log_failure(cudaError_t error, const char* what) noexcept {
  if (error != cudaSuccess && error != cudaErrorCudartUnloading) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  }
}

}  // namespace

void throw_cuda_error(cudaError_t error, std::string_view what, const std::source_location& where) {
  throw CudaError(std::string(what) + ": " + cudaGetErrorName(error) + " (" +
                  cudaGetErrorString(error) + ") at " + where.file_name() + ":" +
                  std::to_string(where.line()));
}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(n_bytes_, other.n_bytes_);
  std::swap(stream_, other.stream_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) log_failure(cudaFreeAsync(data_, stream_), "cudaFreeAsync");
}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(n_bytes_, other.n_bytes_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) log_failure(cudaFreeHost(data_), "cudaFreeHost");
}

Result<std::unique_ptr<CudaContext>> CudaContext::create(int device) {
  int n_devices = 0;
  if (cudaError_t error = cudaGetDeviceCount(&n_devices); error != cudaSuccess) {
    return unavailable(std::string("no CUDA device can be used: ") + cudaGetErrorString(error));
  }
  if (device < 0 || device >= n_devices) {
    return not_found("CUDA device " + std::to_string(device) + "; this host has " +
                     std::to_string(n_devices));
  }
  cuda_check(cudaSetDevice(device), "cudaSetDevice");
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::unique_ptr<CudaContext> context(new CudaContext());
  context->device_ = device;
  context->device_name_ = properties.name;
  context->unique_id_.assign(properties.uuid.bytes, sizeof(properties.uuid.bytes));
  context->total_bytes_ = properties.totalGlobalMem;
  context->compute_capability_ = properties.major * 10 + properties.minor;
  context->n_multiprocessors_ = properties.multiProcessorCount;
  context->shared_bytes_per_block_ = static_cast<int>(properties.sharedMemPerBlockOptin);
  if (context->compute_capability_ < kMinComputeCapability) {
    return unavailable(context->device_name_ + " has compute capability " +
                       std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                       "; 8.0 or newer is needed");
  }
  cuda_check(cudaStreamCreateWithFlags(&context->stream_, cudaStreamNonBlocking),
             "cudaStreamCreate");
  // Freed memory stays with the process: a step never waits for the driver to map memory.
  cudaMemPool_t pool = nullptr;
  cuda_check(cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
  std::uint64_t keep = ~std::uint64_t{0};
  cuda_check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep),
             "cudaMemPoolSetAttribute");
  if (cublasLtCreate(&context->blas_) != CUBLAS_STATUS_SUCCESS) {
    return unavailable("cuBLASLt cannot be initialised on " + context->device_name_);
  }
  auto workspace = context->allocate(kBlasWorkspaceBytes, "the workspace of cuBLASLt");
  if (!workspace.ok()) return workspace.status();
  context->blas_workspace_ = std::move(*workspace);
  return context;
}

CudaContext::~CudaContext() {
  blas_workspace_ = {};
  if (blas_ != nullptr) cublasLtDestroy(blas_);
  if (stream_ == nullptr) return;
  log_failure(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  log_failure(cudaStreamDestroy(stream_), "cudaStreamDestroy");
}

Result<DeviceBuffer> CudaContext::allocate(std::size_t n_bytes, std::string_view what) const {
  if (n_bytes == 0) return DeviceBuffer();
  void* data = nullptr;
  const cudaError_t error = cudaMallocAsync(&data, n_bytes, stream_);
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    return resource_exhausted(std::to_string(n_bytes) + " bytes of device memory for " +
                              std::string(what) + "; " + std::to_string(free_bytes()) +
                              " are free on " + device_name_);
  }
  cuda_check(error, "cudaMallocAsync");
  return DeviceBuffer(static_cast<std::byte*>(data), n_bytes, stream_);
}

Result<PinnedBuffer> CudaContext::allocate_pinned(std::size_t n_bytes,
                                                  std::string_view what) const {
  if (n_bytes == 0) return PinnedBuffer();
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, n_bytes, cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    return resource_exhausted(std::to_string(n_bytes) + " bytes of page-locked memory for " +
                              std::string(what));
  }
  cuda_check(error, "cudaHostAlloc");
  return PinnedBuffer(static_cast<std::byte*>(data), n_bytes);
}

std::uint64_t CudaContext::free_bytes() const {
  std::size_t free = 0;
  std::size_t total = 0;
  cuda_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return free;
}

void CudaContext::to_device(void* target, const void* source, std::size_t n_bytes) const {
  cuda_check(cudaMemcpyAsync(target, source, n_bytes, cudaMemcpyHostToDevice, stream_),
             "copy to the device");
}

void CudaContext::to_host(void* target, const void* source, std::size_t n_bytes) const {
  cuda_check(cudaMemcpyAsync(target, source, n_bytes, cudaMemcpyDeviceToHost, stream_),
             "copy from the device");
}

void CudaContext::copy(void* target, const void* source, std::size_t n_bytes) const {
  cuda_check(cudaMemcpyAsync(target, source, n_bytes, cudaMemcpyDeviceToDevice, stream_),
             "copy on the device");
}

void CudaContext::fill(void* target, int value, std::size_t n_bytes) const {
  cuda_check(cudaMemsetAsync(target, value, n_bytes, stream_), "fill on the device");
}

void CudaContext::synchronize() const {
  cuda_check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

}  // namespace spindle
