#pragma once
// What every body of a stage does before it computes: checks a step against the store and makes
// room for its tokens.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/status.h"
#include "kvstore/kv_store.h"
#include "worker/stage/stage.h"

namespace spindle::worker {

// Extends the sequences of the runs and fills `positions`, one for each of n_rows rows.
// INVALID_ARGUMENT when runs, tokens and rows do not fit each other, the store or the vocabulary
// (first stage); the store may then hold part of the step.
Status extend_for_step(const LlamaStageConfig& config, kvstore::KvStore& store,
                       std::span<const StageRun> runs, std::span<const std::int32_t> tokens,
                       std::int64_t n_rows, std::vector<std::int32_t>& positions);

}  // namespace spindle::worker
