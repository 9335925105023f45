#include "worker/stage/step_upload.h"

#include <cuda_runtime.h>

#include "kernels/core/cuda_check.h"

namespace spindle::worker {

StepUpload::StepUpload(const CudaContext& context, std::size_t slot_bytes, PinnedBuffer host,
                       DeviceBuffer device)
    : context_(&context),
      slot_bytes_(slot_bytes),
      host_(std::move(host)),
      device_(std::move(device)) {
  for (CUevent_st*& event : copied_) {
    cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
}

Result<StepUpload> StepUpload::create(const CudaContext& context, std::size_t n_bytes) {
  const std::size_t slot_bytes = (n_bytes + 255) / 256 * 256;
  auto host = context.allocate_pinned(kSlots * slot_bytes, "the arrays of a step");
  if (!host.ok()) return host.status();
  auto device = context.allocate(slot_bytes, "the arrays of a step");
  if (!device.ok()) return device.status();
  return StepUpload(context, slot_bytes, std::move(*host), std::move(*device));
}

StepUpload::StepUpload(StepUpload&& other) noexcept { *this = std::move(other); }

StepUpload& StepUpload::operator=(StepUpload&& other) noexcept {
  std::swap(context_, other.context_);
  std::swap(slot_bytes_, other.slot_bytes_);
  std::swap(host_, other.host_);
  std::swap(device_, other.device_);
  std::swap(copied_, other.copied_);
  std::swap(slot_, other.slot_);
  std::swap(n_used_, other.n_used_);
  return *this;
}

StepUpload::~StepUpload() {
  for (CUevent_st* event : copied_) {
    if (event != nullptr) static_cast<void>(cudaEventDestroy(event));
  }
}

void StepUpload::begin() {
  slot_ = (slot_ + 1) % kSlots;
  n_used_ = 0;
  // An event that was never recorded counts as done.
  cuda_check(cudaEventSynchronize(copied_[slot_]), "waiting for the upload of an earlier step");
}

void StepUpload::flush() {
  if (n_used_ == 0) return;
  context_->to_device(device_.data(), host_.data() + slot_ * slot_bytes_, n_used_);
  cuda_check(cudaEventRecord(copied_[slot_], context_->stream()), "cudaEventRecord");
}

}  // namespace spindle::worker
