#pragma once
// The forward pass of a contiguous range of a Llama's layers: what one rank computes in a step.
//
// Per layer: RMSNorm, fused q/k/v projection, RoPE, append to the KV pages, causal attention over
// the pages, output projection, RMSNorm, fused gate/up projection, SwiGLU, down projection, with
// the residual stream in fp32. The first stage starts from token ids, the last one ends with
// logits.
//
// Every row of the result depends on the sequence's tokens alone, bit for bit: not on the batch,
// the prefill chunks, the number of threads or the number of stages (kernels/README.md).

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/core/status.h"
#include "kernels/core/tensor_view.h"
#include "kernels/linear.h"
#include "kernels/rope.h"
#include "kvstore/kv_store.h"
#include "worker/model/llama_weights.h"
#include "worker/model/model_config.h"
#include "worker/stage/boundary_scorer.h"
#include "worker/stage/token_table.h"

namespace spindle::worker {

struct LlamaStageConfig {
  model::ModelConfig model;
  model::LayerRange layers;
  bool is_first = false;
  bool is_last = false;
  int max_batched_tokens = 512;
  std::int64_t max_model_len = 0;  // positions are below it
  kernels::LinearMath linear_math = kernels::LinearMath::kF32;
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

// Owns the packed weights and the activations' workspace; does not own the context and the store,
// which must outlive it. Weights are packed once, here.
// Thread-safety: none; one stage thread owns it together with its context and store.
class LlamaStage {
 public:
  static Result<std::unique_ptr<LlamaStage>> create(const LlamaStageConfig& config,
                                                    model::LlamaStageWeights weights,
                                                    const CpuContext& context,
                                                    kvstore::KvStore& store);

  // Runs one micro-batch and appends its K and V to the store. `hidden` is
  // [n_tokens, hidden_size]: written by the first stage from `tokens`, updated in place by all;
  // `logits` is [runs that want logits, vocab_size] on the last stage and empty elsewhere.
  // INVALID_ARGUMENT when the plan does not fit the store (unknown sequence, a gap in positions, a
  // token id outside the vocabulary); the store may then hold part of the step.
  Status forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens, Rows hidden,
                 Rows logits);

  // Logits [n, vocab_size] of rows of a finished step's `hidden`; last stage only.
  void logits_of(ConstRows hidden, Rows logits);

  // Prompt boundaries of a sequence that was just opened or forked; queries of their observation
  // windows are kept as the runs pass.
  void open_boundaries(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                       std::vector<std::int32_t> boundaries) {
    scorer_.open(sequence, needs, std::move(boundaries));
  }
  bool is_boundary(kvstore::SequenceId sequence) const {
    return scorer_.is_boundary(sequence, store_.length(sequence));
  }
  // Scores the boundary that the last run of the sequence reached.
  BoundarySummary score_boundary(kvstore::SequenceId sequence);
  // Carries out a boundary; with `selects`, by the scores of the last score_boundary().
  Result<kvstore::BoundaryKept> compress(kvstore::SequenceId sequence,
                                         kvstore::StageBoundary boundary, bool selects);
  void close_boundaries(kvstore::SequenceId sequence) { scorer_.free(sequence); }

  const BoundaryScorer& scorer() const { return scorer_; }
  const LlamaStageConfig& config() const { return config_; }
  std::uint64_t weight_bytes() const { return weight_bytes_; }

 private:
  struct Layer {
    std::vector<float> input_norm;           // [hidden]
    std::vector<float> post_attention_norm;  // [hidden]
    kernels::PackedLinear qkv;               // [(n_heads + 2 n_kv_heads) * head_dim, hidden]
    kernels::PackedLinear output;            // [hidden, n_heads * head_dim]
    kernels::PackedLinear gate_up;           // [2 * intermediate, hidden]
    kernels::PackedLinear down;              // [hidden, intermediate]
  };

  LlamaStage(const LlamaStageConfig& config, const CpuContext& context, kvstore::KvStore& store,
             kernels::RopeTable rope);
  Status pack(model::LlamaStageWeights weights);
  Status pack_layer(model::LlamaLayerWeights& weights);
  Status prepare(std::span<const StageRun> runs, std::span<const std::int32_t> tokens,
                 std::int64_t n_tokens);
  void forward_layer(int layer, std::span<const StageRun> runs, Rows hidden);
  void attend(int layer, std::span<const StageRun> runs, Rows qkv, Rows out);
  void project_logits(std::span<const StageRun> runs, ConstRows hidden, Rows logits);

  LlamaStageConfig config_;
  const CpuContext& context_;
  kvstore::KvStore& store_;
  kernels::RopeTable rope_;
  std::shared_ptr<const model::HostTensor> embedding_;  // first stage, [vocab, hidden]
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;                   // last stage, [hidden]
  std::unique_ptr<kernels::PackedLinear> lm_head_;  // last stage
  std::uint64_t weight_bytes_ = 0;
  TokenTable token_table_;  // of the stage that has layer 0
  BoundaryScorer scorer_;

  // Workspace for max_batched_tokens rows.
  std::vector<float> normed_;     // [max_tokens, hidden]
  std::vector<float> qkv_;        // [max_tokens, (n_heads + 2 n_kv_heads) * head_dim]
  std::vector<float> attention_;  // [max_tokens, n_heads * head_dim]
  std::vector<float> gate_up_;    // [max_tokens, 2 * intermediate]
  std::vector<float> activated_;  // [max_tokens, intermediate]
  std::vector<float> delta_;      // [max_tokens, hidden]
  std::vector<std::int32_t> positions_;
  std::vector<kernels::AttentionSequence> attention_sequences_;
  std::vector<kernels::KvAppendSequence> append_sequences_;
};

}  // namespace spindle::worker
