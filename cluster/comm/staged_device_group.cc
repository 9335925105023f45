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

Status StagedDeviceGroup::to_host(std::span<std::byte> staging, std::span<const std::byte> data) {
  context_.to_host(staging.data(), data.data(), data.size());
  context_.synchronize();
  return ok_status();
}

Status StagedDeviceGroup::to_device(std::span<std::byte> out, std::span<const std::byte> staging) {
  context_.to_device(out.data(), staging.data(), staging.size());
  // The staging memory is used again by the next call.
  context_.synchronize();
  return ok_status();
}

Status StagedDeviceGroup::send(int dest, std::span<const std::byte> data, Deadline deadline) {
  auto staging = staged(data.size());
  if (!staging.ok()) return staging.status();
  if (Status s = to_host(*staging, data); !s.ok()) return s;
  return host_memory_.send(dest, *staging, deadline);
}

Status StagedDeviceGroup::recv(int source, std::span<std::byte> out, Deadline deadline) {
  auto staging = staged(out.size());
  if (!staging.ok()) return staging.status();
  if (Status s = host_memory_.recv(source, *staging, deadline); !s.ok()) return s;
  return to_device(out, *staging);
}

}  // namespace spindle::comm
