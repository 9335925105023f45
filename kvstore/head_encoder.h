#pragma once
// The bytes of what a boundary moves (head_move.h) in the plan's codec, on the host. Pure: it reads
// the head and fills scratch, so that the store can free the tail's pages before it places the
// result.
//
// Thread-safety: pure functions; CpuContext's rule.

#include "kernels/attention.h"
#include "kernels/core/cpu_context.h"
#include "kernels/rope.h"
#include "kvstore/encoded_head.h"
#include "kvstore/head_cache.h"
#include "kvstore/head_move.h"
#include "kvstore/host_scratch.h"

namespace spindle::kvstore {

EncodedHead encode_head(const CpuContext& context, const HeadCache& head,
                        const kernels::KvPageLayout& layout, const kernels::RopeTable* rope,
                        const HeadTask& task, HeadMove move, HostScratch& scratch);

}  // namespace spindle::kvstore
