#include "worker/config/cluster_settings.h"

namespace spindle::config {
namespace {

DType kv_dtype(Kv::DType dtype) {
  switch (dtype) {
    case Kv::F32:
      return DType::kF32;
    case Kv::BF16:
      return DType::kBF16;
    case Kv::F16:
    case Kv::AUTO:
      return DType::kF16;
  }
  return DType::kF16;
}

}  // namespace

coordinator::ClusterSettings cluster_settings(const Config& config) {
  coordinator::ClusterSettings settings;
  settings.max_model_len = config.model().max_model_len();
  settings.layers_per_stage.assign(config.cluster().layers_per_stage().begin(),
                                   config.cluster().layers_per_stage().end());
  settings.device_memory_bytes.assign(config.cluster().device_memory_bytes().begin(),
                                      config.cluster().device_memory_bytes().end());
  settings.kv_bytes.assign(config.kv().memory_bytes().begin(), config.kv().memory_bytes().end());
  settings.max_num_seqs = config.scheduler().max_num_seqs();
  settings.max_num_batched_tokens = config.scheduler().max_num_batched_tokens();
  settings.bf16_math = config.compute().linear_math() == Compute::BF16;
  settings.kv_dtype = kv_dtype(config.kv().dtype());
  settings.token_table_bytes = static_cast<std::uint64_t>(config.kv().layer0_table_bytes());
  settings.device = config.compute().device() == Compute::CUDA ? coordinator::ComputeDevice::kCuda
                                                               : coordinator::ComputeDevice::kCpu;
  settings.gpu_memory_utilization = config.compute().gpu_memory_utilization();
  return settings;
}

}  // namespace spindle::config
