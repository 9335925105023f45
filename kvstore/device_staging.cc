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
  auto host = context.allocate_pinned(2 * aligned(n_bytes), what);
  if (!host.ok()) return host.status();
  staging->host_ = std::move(*host);
  for (CUevent_st*& event : staging->copied_) {
    cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
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
  first_ += used_;
  used_ = 0;
  sent_ = 0;
  if (first_ + device_.n_bytes() <= host_.n_bytes()) return;
  first_ = 0;
  part_ = 0;
}

void DeviceStaging::enter_parts(std::size_t last) {
  for (; part_ <= part_of(last); ++part_) {
    cuda_check(cudaEventSynchronize(copied_[part_]), "a copy of staged values");
  }
}

std::size_t DeviceStaging::take(std::size_t n_bytes) {
  const std::size_t at = used_;
  used_ += aligned(n_bytes);
  CHECK(used_ <= device_.n_bytes(), "staging is sized for what one round stages");
  if (used_ > at) enter_parts(first_ + used_ - 1);
  return at;
}

void DeviceStaging::send() {
  if (used_ == sent_) return;
  const std::size_t from = first_ + sent_;
  context_.to_device(device_.data() + sent_, host_.data() + from, used_ - sent_);
  for (std::size_t part = part_of(from); part <= part_of(first_ + used_ - 1); ++part) {
    cuda_check(cudaEventRecord(copied_[part], context_.stream()), "cudaEventRecord");
  }
  sent_ = used_;
}

}  // namespace spindle::kvstore
