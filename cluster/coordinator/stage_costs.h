#pragma once
// What the parts of a model cost a stage, from its shape alone: the input of the layer partition.
//
// Time is modelled, not measured, so that it is the same at every start and on every rank: the
// bytes that a step of decode reads when max_num_seqs requests run, in a micro-batch for each stage;
// only then is the slowest stage the speed of all. For a layer these are its matrices and the KV of
// the micro-batch, for the head its matrix. A GPU reads the weights once for all sequences of a
// step; a CPU computes about as much for a byte of weights and a sequence as for a byte of its KV,
// so there the weights count beside the KV of one sequence.
//
// Sizes are what the stages hold (worker/stage), to a few percent and never more, so that what is
// refused here would not have started.
//
// Thread-safety: pure functions.

#include <cstdint>

#include "cluster/coordinator/cluster_settings.h"
#include "cluster/coordinator/layer_partition.h"

namespace spindle::coordinator {

// Tokens of a sequence, at most max_model_len.
inline constexpr std::int64_t kTypicalContext = 1024;

// Costs, workspace of every stage and KV tokens; devices with their memory and speed unknown.
// max_model_len is the one in force (not 0), n_stages at least 1.
PartitionProblem stage_costs(const ClusterSettings& settings, const ModelShape& model,
                             std::int64_t max_model_len, int n_stages);

// Whether the stage with layer 0 holds its K and V of every token id.
bool has_token_table(const ClusterSettings& settings, const ModelShape& model);

// What a GPU keeps for KV beside pool and workspace: the scratch of compression
// (kvstore/device_encoder.h) and of boundary scores (worker/stage/cuda_boundary_scorer.h). An
// estimate of their formulas' large terms.
std::int64_t gpu_scratch_bytes(const ModelShape& model, std::int64_t max_model_len, int n_layers);

}  // namespace spindle::coordinator
