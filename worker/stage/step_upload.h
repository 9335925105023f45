#pragma once
// A step's small arrays (token ids, positions, tables) on their way to a device: written into a
// ring of page-locked buffers and copied as one block to one fixed place, so that launches recorded
// in a graph find them at the same address every step.
//
// Thread-safety: none; the stage's thread.

#include <array>
#include <cstddef>
#include <cstring>
#include <span>

#include "kernels/core/check.h"
#include "kernels/core/cuda_context.h"

struct CUevent_st;

namespace spindle::worker {

class StepUpload {
 public:
  static Result<StepUpload> create(const CudaContext& context, std::size_t n_bytes);
  StepUpload(StepUpload&& other) noexcept;
  StepUpload& operator=(StepUpload&& other) noexcept;
  ~StepUpload();

  // Begins a step's block. Waits when the copy of kSlots steps ago has not run yet.
  void begin();
  // Appends an array, aligned to 64 bytes; answers where it will be on the device. The block must
  // have room.
  template <typename T>
  T* add(std::span<const T> values) {
    T* device = nullptr;
    std::span<T> host = reserve<T>(values.size(), &device);
    if (!values.empty()) std::memcpy(host.data(), values.data(), values.size_bytes());
    return device;
  }
  // The same, to be filled by the caller before flush().
  template <typename T>
  std::span<T> reserve(std::size_t n, T** device) {
    const std::size_t at = n_used_;
    CHECK(n <= (slot_bytes_ - at) / sizeof(T), "the arrays of a step fit its block");
    n_used_ = (at + n * sizeof(T) + 63) / 64 * 64;
    *device = reinterpret_cast<T*>(device_.data() + at);
    return {reinterpret_cast<T*>(host_.data() + slot_ * slot_bytes_ + at), n};
  }
  // Copies what was added, on the stream.
  void flush();

 private:
  static constexpr std::size_t kSlots = 8;

  StepUpload(const CudaContext& context, std::size_t slot_bytes, PinnedBuffer host,
             DeviceBuffer device);

  const CudaContext* context_ = nullptr;
  std::size_t slot_bytes_ = 0;
  PinnedBuffer host_;    // [kSlots][slot_bytes]
  DeviceBuffer device_;  // [slot_bytes]
  std::array<CUevent_st*, kSlots> copied_ = {};
  std::size_t slot_ = 0;
  std::size_t n_used_ = 0;
};

}  // namespace spindle::worker
