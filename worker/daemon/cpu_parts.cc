#include "worker/daemon/compute_parts.h"
#include "worker/stage/llama_stage.h"

namespace spindle::worker {

Status check_pool(std::uint64_t pool_bytes, std::uint64_t one_sequence_bytes,
                  std::int64_t max_model_len) {
  if (pool_bytes >= one_sequence_bytes) return ok_status();
  return invalid_argument(
      "one sequence of max_model_len " + std::to_string(max_model_len) + " takes " +
      std::to_string(one_sequence_bytes) + " bytes of KV on this stage, the pool has " +
      std::to_string(pool_bytes) +
      "; raise kv.memory_bytes or cluster.device_memory_bytes, or lower model.max_model_len");
}

Result<ComputeParts> make_cpu_parts(const ComputeOptions& options, const CpuContext& context,
                                    comm::DeviceGroup& device_group) {
  Status status = check_pool(options.store.budget_bytes, options.one_sequence_bytes,
                             options.stage.max_model_len);
  if (!status.ok()) return status;
  ComputeParts parts;
  parts.device_group = &device_group;
  auto store = kvstore::KvStore::create(options.store);
  if (!store.ok()) return store.status();
  parts.store = std::move(*store);
  auto weights = options.load_weights();
  if (!weights.ok()) return weights.status();
  auto stage = LlamaStage::create(options.stage, std::move(*weights), context, *parts.store);
  if (!stage.ok()) return stage.status();
  parts.stage = std::move(*stage);
  parts.instruction_set = cpu_isa_name(context.isa());
  parts.device =
      "cpu (" + parts.instruction_set + ", " + std::to_string(context.n_threads()) + " threads)";
  return parts;
}

}  // namespace spindle::worker
