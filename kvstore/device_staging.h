#pragma once
// Values on their way from the host to a device: written into page-locked memory and copied
// together, so that many small tables cost one copy. Rounds of begin() lie one after the other in
// a ring of host memory, so the host runs ahead of the device by as many as there is room for: it
// waits only for copies from a part of the ring that it comes to again.
//
// Lifetime: between begin() and the next begin() everything that was sent stays on the device.
// Thread-safety: none; the context's thread.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/status.h"

struct CUevent_st;

namespace spindle::kvstore {

// `n` values that are written at `host` and read by kernels at `device` after send().
template <typename T>
struct Staged {
  T* host = nullptr;
  T* device = nullptr;
  int n = 0;
};

class DeviceStaging {
 public:
  static constexpr std::size_t kAlignment = 64;
  static constexpr std::size_t aligned(std::size_t n_bytes) {
    return (n_bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  template <typename T>
  static constexpr std::size_t bytes_of(std::size_t n) {
    return aligned(n * sizeof(T));
  }

  // The context outlives it. It takes n_bytes of the device, for one round, and twice as many of
  // the host.
  static Result<std::unique_ptr<DeviceStaging>> create(const CudaContext& context,
                                                       std::size_t n_bytes, std::string_view what);
  ~DeviceStaging();
  DeviceStaging(const DeviceStaging&) = delete;
  DeviceStaging& operator=(const DeviceStaging&) = delete;

  void begin();
  // Aligned to 64 bytes, uninitialised. The sum since begin() is at most n_bytes().
  template <typename T>
  Staged<T> add(std::size_t n) {
    const std::size_t at = take(n * sizeof(T));
    return {reinterpret_cast<T*>(host_.data() + first_ + at),
            reinterpret_cast<T*>(device_.data() + at), static_cast<int>(n)};
  }
  template <typename T>
  Staged<T> add(const std::vector<T>& values) {
    const Staged<T> staged = add<T>(values.size());
    std::copy(values.begin(), values.end(), staged.host);
    return staged;
  }
  // One copy of what was added since the last send().
  void send();

  std::size_t n_bytes() const { return device_.n_bytes(); }

 private:
  static constexpr std::size_t kParts = 16;

  explicit DeviceStaging(const CudaContext& context) : context_(context) {}
  std::size_t take(std::size_t n_bytes);
  std::size_t part_of(std::size_t at) const { return at * kParts / host_.n_bytes(); }
  // Copies from the parts up to that of byte `last` are over; those before part_ were waited for.
  void enter_parts(std::size_t last);

  const CudaContext& context_;
  PinnedBuffer host_;
  CUevent_st* copied_[kParts] = {};  // the last copy from that part of host_
  DeviceBuffer device_;
  std::size_t first_ = 0;  // of host_, where the round began
  std::size_t used_ = 0;   // of the round
  std::size_t sent_ = 0;
  std::size_t part_ = 0;  // the next that the host comes to
};

}  // namespace spindle::kvstore
