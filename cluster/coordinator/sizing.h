#pragma once
// How much KV: what every stage of a cluster has for it, what a request takes of that, and how many
// requests run at once. The answer of `spindle plan`, from the functions that the daemon itself
// plans, reserves and admits with:
//
//   layers, weights, workspace   plan_stages (stage_plan.h)
//   KV pool                      cpu_pool_bytes, gpu_pool_bytes (stage_plan.h)
//   admission                    request_demand, headroom_pages (request_demand.h), reserve_pages
//   after boundaries             expected_plan, expected_use (kvstore/plan/expected_use.h)
//
// On a GPU the daemon measures what is free once weights and workspace are there; here they are
// counted, so the pool is an estimate unless kv.memory_bytes states it.
//
// Thread-safety: plain values and pure functions.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cluster/coordinator/cluster_settings.h"
#include "cluster/coordinator/kv_ledger.h"
#include "cluster/coordinator/stage_plan.h"
#include "kernels/core/status.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::coordinator {

struct ClusterDescription {
  ClusterSettings settings;
  ModelShape model;
  std::vector<DeviceFacts> devices;  // one for each stage; on a GPU with their memory
};

struct StageSizing {
  StagePrediction predicted;
  std::int64_t memory_bytes = 0;  // for weights, workspace, scratch and KV; 0: not stated
  std::int64_t workspace_bytes = 0;
  std::int64_t scratch_bytes = 0;  // on a GPU, beside those (stage_costs.h)
  std::uint64_t kv_pool_bytes = 0;
  bool pool_is_estimate = false;
  StageCapacity capacity;                // the pool in pages
  std::uint64_t kv_bytes_per_token = 0;  // uncompressed, in the pool's type
};

struct ClusterSizing {
  std::int64_t max_model_len = 0;
  kvstore::KvShape shape;
  kvstore::KvModel kv_model;
  std::vector<StageSizing> stages;
  int slowest = 0;
};
// What plan_stages refuses. RESOURCE_EXHAUSTED when a pool does not hold one sequence of full
// length; INVALID_ARGUMENT for no device, a GPU whose memory is not known or whose pool would be
// beyond what a GPU's can be; UNIMPLEMENTED for a model that the CUDA bodies do not know.
Result<ClusterSizing> size_cluster(const ClusterDescription& cluster);

// What users send: `policy` is the server's default or a request's own.
struct RequestKind {
  std::int64_t prompt_tokens = 0;
  std::int64_t output_tokens = 0;
  kvstore::KvPolicy policy;
  const kvstore::ProfileTable* table = nullptr;  // of the model, or none
};

// One request on one stage.
struct RequestUse {
  std::int64_t alone_pages = 0;      // what it may take; more than a stage has is refused
  std::int64_t admission_pages = 0;  // committed when it is admitted
  std::int64_t tokens_ahead = 0;     // what is kept free for its growth (request_demand.h)
  std::int64_t prefill_pages = 0;    // held at the end of its prompt
  std::int64_t held_pages = 0;       // held and reserved later on, at most
  std::uint64_t prompt_bytes = 0;    // held right after the prompt's boundary
  std::uint64_t final_bytes = 0;     // after the last boundary of its output
};

struct RequestSizing {
  kvstore::SequencePlan plan;      // of the prompt's boundary
  std::vector<RequestUse> stages;  // [n_stages]
  // Requests that run at once to the end of their output, none of them preempted, whatever the
  // order they come in: all others are as long as they get when the last one is admitted.
  std::vector<std::int64_t> fitting;  // [n_stages], by KV alone
  std::int64_t concurrency = 0;       // the least of them, at most max_num_seqs
  int limiting_stage = -1;            // -1: max_num_seqs
};
// INVALID_ARGUMENT for lengths beyond max_model_len, what validate_policy and plan_boundary refuse.
Result<RequestSizing> size_requests(const ClusterDescription& cluster, const ClusterSizing& sizing,
                                    const RequestKind& kind);

// How many requests of this use fit a stage's pages.
std::int64_t requests_that_fit(const kvstore::KvShape& shape, const StageCapacity& stage,
                               const RequestUse& use);

// What one request holds of each stage after every boundary: the prompt's, then one for each
// kGeneratedBoundary tokens of output.
struct BoundaryUse {
  std::int64_t n_tokens = 0;
  std::vector<std::uint64_t> bytes;      // [n_stages]
  std::vector<std::int64_t> held_pages;  // [n_stages], with what it may take up to the next one
};
std::vector<BoundaryUse> boundary_uses(const ClusterSizing& sizing, const RequestKind& kind,
                                       const kvstore::SequencePlan& plan);

}  // namespace spindle::coordinator
