#pragma once
// The plain interface between DecodeWorkspace (host code) and the kernels of decode attention.

#include <cstddef>
#include <cstdint>

#include "kernels/core/dtype.h"
#include "kernels/cuda/kv_device.h"

struct CUstream_st;

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// Query heads one tensor core tile holds; larger groups are several entries of the plan.
inline constexpr int kDecodeTileHeads = 8;

// What the grid works on: one tile of query heads of one kv head of one sequence. The weights of a
// layer's entries lie behind each other, and every team takes an equal share of the line.
struct alignas(16) DecodeEntry {
  std::int64_t begin = 0;  // weight of the entries before it
  std::int64_t end = 0;
  DeviceKvHead head;
  std::int32_t row = 0;  // in q and out
  std::int32_t n_context = 0;
  std::int32_t first_head = 0;  // query head of the tile's first row
  std::int32_t n_heads = 0;     // at most kDecodeTileHeads
  std::int32_t block_weight = 0;
  std::int32_t first_part = 0;  // teams that have a part of it: [first_part, last_part]
  std::int32_t last_part = 0;
  std::int32_t first_slot = 0;  // of the first part's team
};
static_assert(sizeof(DecodeEntry) == 128);

// The share of a team, and a copy of its first entry, so that all it needs to begin comes at once.
struct alignas(16) DecodeShare {
  std::int64_t begin = 0;  // on the line of weights; empty: begin == end
  std::int64_t end = 0;
  std::int64_t entry = 0;  // number of the first
  std::int64_t unused = 0;
  DecodeEntry first;
};
static_assert(sizeof(DecodeShare) == 160);

// Device memory of a workspace, for at most max_entries entries a layer.
struct DecodePlan {
  DecodeEntry* entries = nullptr;     // [n_layers][max_entries]
  DecodeShare* shares = nullptr;      // [n_layers][n_teams]
  float* partials = nullptr;          // [n_teams][2][decode_partial_floats()]
  std::uint32_t* arrivals = nullptr;  // [max_entries], zero between launches
  int max_entries = 0;
  int n_layers = 0;
  int n_teams = 0;
};

// The sums of a part of a head: values [8][head_dim], then the maxima [8] and the masses [8].
SPINDLE_HOST_DEVICE constexpr std::size_t decode_partial_floats(int head_dim) {
  return static_cast<std::size_t>(kDecodeTileHeads) * static_cast<std::size_t>(head_dim + 2);
}

struct DecodeCall {
  const std::byte* pool = nullptr;
  std::uint64_t page_bytes = 0;
  const F16* q = nullptr;
  std::int64_t q_stride = 0;
  Bf16* out = nullptr;
  std::int64_t out_stride = 0;
  const float* rope_cos = nullptr;
  const float* rope_sin = nullptr;
  std::int64_t max_positions = 0;
  float rope_scale = 1.0F;
  float scale = 1.0F;
  int n_entries = 0;
  int layer = 0;
  int head_dim = 0;
  DType dtype = DType::kF16;
};

// The kernels of one set of formats, each set in a file of its own.
struct DecodeKernels {
  // teams that one multiprocessor holds; also lets the kernels use the shared memory they need.
  int (*teams_per_multiprocessor)(int head_dim);
  void (*launch)(const CudaContext& context, const DecodePlan& plan, const DecodeCall& call);
};
DecodeKernels decode_raw_kernels();
DecodeKernels decode_int4_kernels();
DecodeKernels decode_lloyd_kernels();
DecodeKernels decode_lloyd_table_kernels();  // compute capability 9.0
DecodeKernels decode_kivi_kernels();
DecodeKernels decode_rows_kernels();
DecodeKernels decode_all_kernels();

void launch_plan_decode(CUstream_st* stream, const DecodePlan& plan,
                        const DeviceSequence* sequences, int n_sequences, int n_layers,
                        int n_kv_heads, int group);

}  // namespace spindle::kernels
