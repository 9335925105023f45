#pragma once
// Which layers each stage owns: contiguous ranges, chosen from what layers cost and what the
// stages' devices can do and hold.
//
// The rule. A partition is feasible when on every stage whose memory is known the weights, the
// workspace and the KV of one sequence of full length fit. A feasible one has
//
//   time    of its slowest stage, which all others wait for, and
//   tokens  of KV on its tightest stage, which limits what the whole pipeline can hold.
//
// Its worth is tokens^kv_weight / time. Of the feasible partitions whose worth is within
// `tolerance` of the best, the one with the most tokens is taken; among those the fastest; among
// those the one with the larger earlier stage, and so on along the pipeline.
//
// kv_weight 0 is "as fast as possible, then memory": a device with less memory gets fewer layers
// where that costs no more than the tolerance. kStatedMemoryKvWeight, 1, is for memory that a user
// stated: worth is tokens / time, so twice the tokens are worth a slowest stage of up to twice the
// time, and two unequal devices end up near equal tokens. Why: who states memory has too little of
// it, and KV is what it is needed for. A step of decode reads the weights once for all its
// sequences, and how many there are grows with the tokens that fit, so tokens per second grow like
// tokens / time as long as weights are most of what is read. Where KV is, a step takes as much
// longer as it serves more, and what is bought is room (longer contexts, more sequences, fewer that
// wait), not speed. Tokens beyond max_kv_tokens can never be used and count nothing: memory that
// does not bind does not move a layer.
//
// Why 5 %: time is modelled or measured to a few percent, so a smaller difference is not one; and
// one layer of a usual stage (8 to 40) is 2.5 to 12 % of it, so the tolerance lets a layer move
// where stages are long and keeps it where they are short.
//
// Deterministic: times are rounded to whole parts of 2^-52 of their sum and all sums are exact, so
// equal layers are equal wherever they are and equal input gives equal ranges on every machine.
// The method: dynamic programming over (stage, first layer) for the fastest partition whose stages
// all hold at least n tokens, at the values of n where its result changes. Exact.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::coordinator {

struct LayerRange {
  int first = 0;
  int count = 0;
  bool operator==(const LayerRange&) const = default;
};

// What a part of the model costs. Times are in any unit, the same for all; sizes in bytes.
struct PartCost {
  double time = 0.0;
  std::int64_t weight_bytes = 0;
  std::int64_t kv_bytes_per_token = 0;
};

struct StageDevice {
  double speed = 1.0;             // 2: everything takes half the time
  std::int64_t memory_bytes = 0;  // for weights, workspace and KV; 0: unknown, nothing is refused
  std::int64_t kv_bytes = 0;      // size of the KV pool; 0: what memory_bytes leaves
  std::int64_t workspace_bytes = 0;
};

inline constexpr double kTimeTolerance = 0.05;
inline constexpr double kStatedMemoryKvWeight = 1.0;

struct PartitionProblem {
  std::vector<PartCost> layers;
  PartCost embedding;                 // on the first stage
  PartCost head;                      // final norm, head and sampling, on the last stage
  std::vector<StageDevice> devices;   // one for each stage
  std::int64_t min_kv_tokens = 0;     // one sequence of full length, in whole pages
  std::int64_t max_kv_tokens = 0;     // more cannot be used; 0: no limit
  double tolerance = kTimeTolerance;  // 0 to 100
  double kv_weight = 0.0;             // 0 to 8
};

// What is predicted of a stage.
struct StagePrediction {
  LayerRange layers;
  double time = 0.0;        // in the unit of PartCost, on this stage's device
  double time_share = 0.0;  // of the sum over all stages; equal stages have 1 / n_stages
  std::int64_t weight_bytes = 0;
  std::int64_t kv_bytes = -1;   // the pool; -1: memory is not known
  std::int64_t kv_tokens = -1;  // that the pool holds, uncompressed; -1: memory is not known
};

struct LayerPartition {
  std::vector<StagePrediction> stages;
  int slowest = 0;    // the first stage with the largest time
  int tightest = -1;  // the first stage with the fewest KV tokens; -1: no stage's memory is known
};

// RESOURCE_EXHAUSTED when no partition is feasible: names the stage that lacks memory and the
// missing bytes, in the partition whose largest lack is the smallest. INVALID_ARGUMENT for fewer
// layers than stages, more than 4096 layers, and costs that are negative, not finite or beyond
// 2^50.
Result<LayerPartition> partition_layers(const PartitionProblem& problem);

// The same figures for an explicit `layers_per_stage`. INVALID_ARGUMENT unless it has an entry for
// each stage, each at least 1, that sum to the number of layers; RESOURCE_EXHAUSTED when a stage
// lacks memory.
Result<LayerPartition> partition_as_told(const PartitionProblem& problem,
                                         std::span<const int> layers_per_stage);

}  // namespace spindle::coordinator
