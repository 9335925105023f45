// What the sizing of a cluster takes for a GPU's scratch, against the formulas of those who
// allocate it. Needs the CUDA libraries, and no GPU.

#include <gtest/gtest.h>

#include "cluster/coordinator/stage_costs.h"
#include "kvstore/device_memory.h"
#include "worker/stage/cuda_boundary_scorer.h"

namespace spindle {
namespace {

struct Shape {
  int n_layers;
  int hidden;
  int n_heads;
  int n_kv_heads;
  int head_dim;
  std::int64_t max_model_len;
};

TEST(GpuScratch, IsWhatIsAllocated) {
  for (const Shape& shape : {Shape{32, 4096, 32, 8, 128, 65536}, Shape{8, 4096, 32, 8, 128, 8192},
                             Shape{20, 8192, 64, 8, 128, 32768}, Shape{16, 2048, 32, 8, 64, 131072},
                             Shape{80, 8192, 64, 8, 128, 4096}}) {
    kvstore::DeviceMemoryConfig memory;
    memory.store.shape = {shape.n_kv_heads, shape.head_dim, DType::kF16, 32};
    memory.store.n_layers = shape.n_layers;
    memory.store.budget_bytes = std::uint64_t{64} << 30;
    memory.max_model_len = shape.max_model_len;
    worker::LlamaStageConfig stage;
    stage.layers = {0, shape.n_layers};
    stage.max_model_len = shape.max_model_len;
    stage.model.hidden_size = shape.hidden;
    const std::uint64_t allocated = kvstore::DeviceMemory::scratch_bytes(memory) +
                                    worker::CudaBoundaryScorer::scratch_bytes(
                                        stage, {shape.n_heads, shape.n_kv_heads, shape.head_dim});
    coordinator::ModelShape model;
    model.hidden_size = shape.hidden;
    model.n_heads = shape.n_heads;
    model.n_kv_heads = shape.n_kv_heads;
    model.head_dim = shape.head_dim;
    EXPECT_NEAR(static_cast<double>(
                    coordinator::gpu_scratch_bytes(model, shape.max_model_len, shape.n_layers)),
                static_cast<double>(allocated), 0.02 * static_cast<double>(allocated))
        << shape.n_layers << " layers, " << shape.max_model_len << " tokens";
  }
}

}  // namespace
}  // namespace spindle
