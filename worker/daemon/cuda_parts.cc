#include <algorithm>

#include "cluster/comm/nccl_device_group.h"
#include "cluster/comm/staged_device_group.h"
#include "cluster/coordinator/stage_plan.h"
#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/devices.h"
#include "kvstore/device_memory.h"
#include "worker/daemon/compute_parts.h"
#include "worker/stage/cuda_stage.h"

namespace spindle::worker {
namespace {

class CudaOwner final : public ComputeOwner {
 public:
  std::unique_ptr<CudaContext> context;
  std::unique_ptr<comm::DeviceGroup> group;  // on the context
};

Result<std::unique_ptr<CudaContext>> open_device(int local_rank) {
  const auto devices = kernels::list_cuda_devices();
  if (!devices.ok()) return devices.status();
  if (devices->empty()) return unavailable("compute.device is CUDA, and this host has no GPU");
  return CudaContext::create(local_rank % static_cast<int>(devices->size()));
}

// Which GPUs the ranks compute on.
struct Sharing {
  int ranks_here = 1;   // on this rank's GPU
  bool shared = false;  // somewhere two ranks compute on one GPU
};
// Every rank takes part, also when it has no device, so that none waits for it.
Result<Sharing> find_sharing(const Result<std::unique_ptr<CudaContext>>& context,
                             comm::HostGroup& host, Deadline deadline) {
  const bool ok = context.ok();
  const std::string mine = ok ? "=" + (*context)->unique_id() : "!" + context.status().message();
  auto all = host.all_gather(mine, deadline);
  if (!ok) return context.status();
  if (!all.ok()) return all.status();
  Sharing sharing;
  sharing.ranks_here = static_cast<int>(std::count(all->begin(), all->end(), mine));
  for (std::size_t rank = 0; rank < all->size(); ++rank) {
    const std::string& said = (*all)[rank];
    if (said.front() == '!') {
      return unavailable("rank " + std::to_string(rank) + ": " + said.substr(1));
    }
    sharing.shared = sharing.shared || std::count(all->begin(), all->end(), said) > 1;
  }
  return sharing;
}

Result<std::unique_ptr<comm::DeviceGroup>> connect(comm::HostGroup& host,
                                                   comm::DeviceGroup& host_memory,
                                                   const CudaContext& context, bool shared,
                                                   std::size_t max_tensor_bytes,
                                                   Deadline deadline) {
  if (shared) {
    auto staged = comm::StagedDeviceGroup::create(host_memory, context, max_tensor_bytes);
    if (!staged.ok()) return staged.status();
    return std::unique_ptr<comm::DeviceGroup>(std::move(*staged));
  }
  auto nccl = comm::NcclDeviceGroup::create(host, context, max_tensor_bytes, deadline);
  if (!nccl.ok()) return nccl.status();
  return std::unique_ptr<comm::DeviceGroup>(std::move(*nccl));
}

Result<ComputeParts> make_parts(const ComputeOptions& options, comm::HostGroup& host,
                                comm::DeviceGroup& device_group) {
  const auto deadline = Deadline::after(options.startup_timeout);
  auto context = open_device(options.local_rank);
  const auto sharing = find_sharing(context, host, deadline);
  if (!sharing.ok()) return sharing.status();
  auto owner = std::make_unique<CudaOwner>();
  owner->context = std::move(*context);
  const CudaContext& cuda = *owner->context;
  const std::uint64_t free_at_start = cuda.free_bytes();

  ComputeParts parts;
  parts.device_group = &device_group;
  if (host.size() > 1) {
    const std::size_t max_tensor_bytes =
        static_cast<std::size_t>(options.stage.max_batched_tokens) *
        static_cast<std::size_t>(options.stage.model.hidden_size) * sizeof(float);
    auto group = connect(host, device_group, cuda, sharing->shared, max_tensor_bytes, deadline);
    if (!group.ok()) return group.status();
    owner->group = std::move(*group);
    parts.device_group = owner->group.get();
  }

  auto weights = options.load_weights();
  if (!weights.ok()) return weights.status();
  auto stage = CudaStage::create(options.stage, std::move(*weights), cuda);
  if (!stage.ok()) return stage.status();

  kvstore::DeviceMemoryConfig memory_config{options.store, options.stage.max_model_len,
                                            (*stage)->rope()};
  if (memory_config.store.budget_bytes == 0) {
    memory_config.store.budget_bytes = coordinator::gpu_pool_bytes(
        {.total_bytes = cuda.total_bytes(),
         .free_at_start = free_at_start,
         .free_now = cuda.free_bytes(),
         .scratch_bytes =
             kvstore::DeviceMemory::scratch_bytes(memory_config) + (*stage)->reserved_bytes(),
         .stated_bytes = options.device_memory_bytes,
         .planned_bytes = options.planned_bytes,
         .utilization = options.gpu_memory_utilization,
         .ranks_here = sharing->ranks_here});
  }
  Status status = check_pool(memory_config.store.budget_bytes, options.one_sequence_bytes,
                             options.stage.max_model_len);
  if (!status.ok()) return status;
  auto memory = kvstore::DeviceMemory::create(cuda, memory_config);
  if (!memory.ok()) return memory.status();
  auto store = kvstore::KvStore::create(memory_config.store, std::move(*memory));
  if (!store.ok()) return store.status();
  if (status = (*stage)->use_store(**store); !status.ok()) return status;

  parts.device = "cuda " + std::to_string(cuda.device()) + " (" + cuda.device_name() + ")";
  parts.instruction_set = "sm_" + std::to_string(cuda.compute_capability());
  parts.owner = std::move(owner);
  parts.store = std::move(*store);
  parts.stage = std::move(*stage);
  return parts;
}

}  // namespace

Result<ComputeParts> make_cuda_parts(const ComputeOptions& options, comm::HostGroup& host,
                                     comm::DeviceGroup& device_group) {
  try {
    return make_parts(options, host, device_group);
  } catch (const CudaError& error) {
    return unavailable(error.what());
  }
}

}  // namespace spindle::worker
