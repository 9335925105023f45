#include "cluster/comm/staged_device_group.h"

#include <string>
#include <utility>

namespace spindle::comm {

StagedDeviceGroup::StagedDeviceGroup(DeviceGroup& host_memory, const CudaContext& context,
                                     PinnedBuffer staging)
    : DeviceGroup(host_memory.rank(), host_memory.size()),
      host_memory_(host_memory),
      context_(context),
      staging_(std::move(staging)) {}

Result<std::unique_ptr<StagedDeviceGroup>> StagedDeviceGroup::create(DeviceGroup& host_memory,
                                                                     const CudaContext& context,
                                                                     std::size_t max_tensor_bytes) {
  auto staging = context.allocate_pinned(max_tensor_bytes, "activations between stages");
  if (!staging.ok()) return staging.status();
  return std::unique_ptr<StagedDeviceGroup>(
      new StagedDeviceGroup(host_memory, context, std::move(*staging)));
}

Result<std::span<std::byte>> StagedDeviceGroup::staged(std::size_t n_bytes) {
  if (n_bytes > staging_.n_bytes()) {
    return too_large("a tensor of " + std::to_string(n_bytes) + " bytes; the limit is " +
                     std::to_string(staging_.n_bytes()));
  }
  return std::span(staging_.data(), n_bytes);
}

void StagedDeviceGroup::to_host(std::span<std::byte> staging, std::span<const std::byte> data) {
  context_.synchronize();  // what is computed before is no part of the copy
  const auto began = std::chrono::steady_clock::now();
  context_.to_host(staging.data(), data.data(), data.size());
  context_.synchronize();
  to_host_time_ += std::chrono::steady_clock::now() - began;
}

void StagedDeviceGroup::to_device(std::span<std::byte> out, std::span<const std::byte> staging) {
  const auto began = std::chrono::steady_clock::now();
  context_.to_device(out.data(), staging.data(), staging.size());
  // The staging memory is used again by the next call.
  context_.synchronize();
  to_device_time_ += std::chrono::steady_clock::now() - began;
}

TensorTimes StagedDeviceGroup::tensor_times() {
  TensorTimes times = host_memory_.tensor_times();
  times.send_us += static_cast<std::uint64_t>(to_host_time_.count()) / 1000;
  times.receive_us += static_cast<std::uint64_t>(to_device_time_.count()) / 1000;
  return times;
}

Status StagedDeviceGroup::send(int dest, std::span<const std::byte> data, Deadline deadline) {
  auto staging = staged(data.size());
  if (!staging.ok()) return staging.status();
  to_host(*staging, data);
  return host_memory_.send(dest, *staging, deadline);
}

Status StagedDeviceGroup::recv(int source, std::span<std::byte> out, Deadline deadline) {
  auto staging = staged(out.size());
  if (!staging.ok()) return staging.status();
  if (Status s = host_memory_.recv(source, *staging, deadline); !s.ok()) return s;
  to_device(out, *staging);
  return ok_status();
}

}  // namespace spindle::comm
