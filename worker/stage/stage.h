#pragma once
// Stage: the forward pass of a contiguous range of a model's layers, what one rank computes in a
// step. LlamaStage is the CPU body and the oracle, CudaStage the GPU body; StageWorker drives
// either.
//
// A step is: activations() filled by the stage before (unless this is the first), forward(), then
// on the last stage sample(), and boundaries of the sequences that reached one.
//
// Thread-safety: none; one stage thread owns a stage together with its store.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/core/status.h"
#include "kernels/core/tensor_view.h"
#include "kernels/linear.h"
#include "kernels/sample.h"
#include "kvstore/kv_store.h"
#include "worker/model/llama_weights.h"
#include "worker/model/model_config.h"
#include "worker/stage/boundary_scorer.h"
#include "worker/stage/stage_clock.h"

namespace spindle::worker {

struct LlamaStageConfig {
  model::ModelConfig model;
  model::LayerRange layers;
  bool is_first = false;
  bool is_last = false;
  int max_batched_tokens = 512;
  int max_num_seqs = 64;                                        // runs of one step
  std::int64_t max_model_len = 0;                               // positions are below it
  kernels::LinearMath linear_math = kernels::LinearMath::kF32;  // CPU
  // Layer 0's table of K and V by token id is built up to this size; beyond, its KV cannot be kept
  // as token ids.
  std::uint64_t token_table_bytes = 256ULL << 20;
};

// A contiguous run of one sequence's tokens; rows follow one another in the order of the runs.
struct StageRun {
  kvstore::SequenceId sequence = 0;
  std::int32_t first_position = 0;
  std::int32_t n_tokens = 0;
  bool wants_logits = false;  // of its last token; last stage only
};

// What one token is drawn from. Histories are borrowed from TokenSampler until the sequence
// changes.
struct SampleRequest {
  std::uint64_t sequence = 0;
  std::int64_t row = 0;  // of the step's logits: runs that want logits, in order
  kernels::SampleParams params;
  kernels::SampleKey key;
  std::span<const std::int32_t> prompt_ids;
  std::span<const std::int32_t> output_ids;
  std::vector<kernels::LogitBias> bias;
  std::vector<std::int32_t> banned;
  std::int32_t n_logprobs = -1;  // < 0: none
};

class Stage {
 public:
  virtual ~Stage() = default;
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  // Called once by the thread that will drive the stage, before anything else below.
  virtual void bind_thread() = 0;

  virtual const LlamaStageConfig& config() const = 0;
  virtual std::uint64_t weight_bytes() const = 0;

  // The step's activations, f32 [n_tokens, hidden_size], n_tokens <= max_batched_tokens, in the
  // memory that the rank's DeviceGroup moves: the input of every stage but the first, then the
  // output.
  virtual std::span<std::byte> activations(std::int64_t n_tokens) = 0;

  // Runs one micro-batch and appends its K and V to the store. INVALID_ARGUMENT when the plan does
  // not fit the store (unknown sequence, a gap in positions, a token id outside the vocabulary);
  // the store may then hold part of the step. A GPU body returns when the work is enqueued.
  virtual Status forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens) = 0;

  // Last stage: one token for each request, -1 when its logits have no finite probability. A GPU
  // body calls `meanwhile`, unless it is empty, when the drawing is enqueued, and again until it
  // returns false or the tokens are there: what is enqueued there, even a forward(), comes behind.
  // A CPU body does not call it.
  virtual Status sample(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                        const std::function<bool()>& meanwhile) = 0;
  // Last stage: a row of the step's logits [vocab_size] in host memory, until the next forward().
  virtual Result<std::span<const float>> logits(std::int64_t row) = 0;
  // Last stage: logits of the rows from first_row on of the step's activations, into host memory.
  virtual Status prompt_logits(std::int64_t first_row, Rows logits) = 0;

  // Prompt boundaries of a sequence that was just opened or forked; queries of their observation
  // windows are kept as the runs pass.
  virtual void open_boundaries(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                               std::vector<std::int32_t> boundaries) = 0;
  virtual bool is_boundary(kvstore::SequenceId sequence) const = 0;
  // Scores the boundary that the last run of the sequence reached.
  virtual BoundarySummary score_boundary(kvstore::SequenceId sequence) = 0;
  // Carries out a boundary; with `selects`, by the scores of the last score_boundary().
  virtual Result<kvstore::BoundaryKept> compress(kvstore::SequenceId sequence,
                                                 kvstore::StageBoundary boundary, bool selects) = 0;
  virtual void close_boundaries(kvstore::SequenceId sequence) = 0;

  // Of what this stage computes on; the caller marks it.
  virtual StageClock& clock() = 0;

 protected:
  Stage() = default;
};

}  // namespace spindle::worker
