#include "kvstore/device_staging.h"

#include <cuda_runtime.h>

#include <utility>

#include "kernels/core/cuda_check.h"

namespace spindle::kvstore {

Result<std::unique_ptr<DeviceStaging>> DeviceStaging::create(const CudaContext& context,
                                                             std::size_t n_bytes,
                                                             std::string_view what) {
  std::unique_ptr<DeviceStaging> staging(new DeviceStaging(context));
  auto device = context.allocate(aligned(n_bytes), what);
  if (!device.ok()) return device.status();
  staging->device_ = std::move(*device);
  for (int half = 0; half < 2; ++half) {
    auto host = context.allocate_pinned(aligned(n_bytes), what);
    if (!host.ok()) return host.status();
    staging->host_[half] = std::move(*host);
    cuda_check(cudaEventCreateWithFlags(&staging->copied_[half], cudaEventDisableTiming),
               "cudaEventCreate");
  }
  return staging;
}

DeviceStaging::~DeviceStaging() {
  for (CUevent_st* event : copied_) {
    if (event == nullptr) continue;
    // The host's memory goes away next. A failure was or will be reported by the stream.
    static_cast<void>(cudaEventSynchronize(event));
    static_cast<void>(cudaEventDestroy(event));
  }
}

void DeviceStaging::begin() {
  half_ = 1 - half_;
  used_ = 0;
  sent_ = 0;
  cuda_check(cudaEventSynchronize(copied_[half_]), "a copy of staged values");
}

std::size_t DeviceStaging::take(std::size_t n_bytes) {
  const std::size_t at = used_;
  used_ += aligned(n_bytes);
  CHECK(used_ <= device_.n_bytes(), "staging is sized for what one round stages");
  return at;
}

void DeviceStaging::send() {
  if (used_ == sent_) return;
  context_.to_device(device_.data() + sent_, host_[half_].data() + sent_, used_ - sent_);
  sent_ = used_;
  cuda_check(cudaEventRecord(copied_[half_], context_.stream()), "cudaEventRecord");
}

}  // namespace spindle::kvstore
