#pragma once
// DeviceGroup for stages on GPUs whose tensors travel through host memory over another group: for
// ranks that share a GPU, which NCCL does not serve, and for several stages in one test process.
//
// Every call waits for the device, so it costs what NCCL would hide; a server with a GPU per rank
// uses NcclDeviceGroup.

#include <chrono>
#include <memory>

#include "cluster/comm/device_group.h"
#include "kernels/core/cuda_context.h"

namespace spindle::comm {

// Does not own `host_memory` and the context; both outlive it. Thread-safety: tensors from one
// thread, the stage's, collectives from one; abort() from any.
class StagedDeviceGroup final : public DeviceGroup {
 public:
  // Tensors of at most max_tensor_bytes.
  static Result<std::unique_ptr<StagedDeviceGroup>> create(DeviceGroup& host_memory,
                                                           const CudaContext& context,
                                                           std::size_t max_tensor_bytes);

  Status send(int dest, std::span<const std::byte> data, Deadline deadline) override;
  Status recv(int source, std::span<std::byte> out, Deadline deadline) override;
  bool recv_waits() const override { return true; }
  Status flush(Deadline deadline) override { return host_memory_.flush(deadline); }
  Status all_gather(std::span<const std::byte> mine, std::span<std::byte> all,
                    Deadline deadline) override {
    return host_memory_.all_gather(mine, all, deadline);
  }
  Status broadcast(std::span<std::byte> data, int root, Deadline deadline) override {
    return host_memory_.broadcast(data, root, deadline);
  }
  void abort(std::string_view why) override { host_memory_.abort(why); }
  // With the copies between host and device.
  TensorTimes tensor_times() override;

 private:
  StagedDeviceGroup(DeviceGroup& host_memory, const CudaContext& context, PinnedBuffer staging);
  // The first n bytes of the staging memory; TOO_LARGE beyond it.
  Result<std::span<std::byte>> staged(std::size_t n_bytes);
  void to_host(std::span<std::byte> staging, std::span<const std::byte> data);
  void to_device(std::span<std::byte> out, std::span<const std::byte> staging);

  DeviceGroup& host_memory_;
  const CudaContext& context_;
  PinnedBuffer staging_;
  std::chrono::nanoseconds to_host_time_{0};
  std::chrono::nanoseconds to_device_time_{0};
};

}  // namespace spindle::comm
