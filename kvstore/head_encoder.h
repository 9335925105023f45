#pragma once
// The bytes of what a boundary moves (head_move.h) in the plan's codec. Pure: it reads the head and
// fills buffers, so that the store can free the tail's pages before it places the result.
//
// Thread-safety: pure functions; CpuContext's rule.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/codebook.h"
#include "kernels/core/cpu_context.h"
#include "kernels/rope.h"
#include "kvstore/head_cache.h"
#include "kvstore/head_move.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::kvstore {

// Thresholds of the codebook (SpindleKV, section 3).
inline constexpr float kCodebookThetaK = 0.98F;
inline constexpr float kCodebookThetaV = 0.95F;

struct EncodedSide {
  std::vector<std::byte> codes;
  std::vector<std::byte> scales;
};
struct EncodedBlock {
  kernels::KvBlock view;  // pointers are set when the pieces are placed
  EncodedSide k;
  EncodedSide v;
  std::vector<std::byte> positions;
};
struct EncodedHead {
  HeadMove move;
  std::vector<EncodedBlock> blocks;   // after those that the head has
  std::vector<std::uint16_t> k_mean;  // when the head has none yet
  std::vector<std::uint16_t> v_mean;
  std::vector<std::uint16_t> k_entries;  // new entries of the books
  std::vector<std::uint16_t> v_entries;
};

EncodedHead encode_head(const CpuContext& context, const HeadCache& head,
                        const kernels::KvPageLayout& layout, const kernels::RopeTable* rope,
                        const HeadTask& task);

}  // namespace spindle::kvstore
