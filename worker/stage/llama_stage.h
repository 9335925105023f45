#pragma once
// The CPU body of Stage.
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
#include "worker/stage/stage.h"
#include "worker/stage/token_table.h"

namespace spindle::worker {

// Owns the packed weights and the activations' workspace; does not own the context and the store,
// which must outlive it. Weights are packed once, here.
// Thread-safety: none; one stage thread owns it together with its context and store.
class LlamaStage final : public Stage {
 public:
  static Result<std::unique_ptr<LlamaStage>> create(const LlamaStageConfig& config,
                                                    model::LlamaStageWeights weights,
                                                    const CpuContext& context,
                                                    kvstore::KvStore& store);

  void bind_thread() override {}
  const LlamaStageConfig& config() const override { return config_; }
  std::uint64_t weight_bytes() const override { return weight_bytes_; }
  std::span<std::byte> activations(std::int64_t n_tokens) override;
  Status forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens) override;
  Status sample(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                const std::function<bool()>& meanwhile) override;
  Result<std::span<const float>> logits(std::int64_t row) override;
  Status prompt_logits(std::int64_t first_row, Rows logits) override;

  // forward() on the caller's memory: `hidden` is [n_tokens, hidden_size], written by the first
  // stage from `tokens`, updated in place by all; `logits` is [runs that want logits, vocab_size]
  // on the last stage and empty elsewhere.
  Status forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens, Rows hidden,
                 Rows logits);

  // Logits [n, vocab_size] of rows of a finished step's `hidden`; last stage only.
  void logits_of(ConstRows hidden, Rows logits);

  void open_boundaries(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                       std::vector<std::int32_t> boundaries) override {
    scorer_.open(sequence, needs, std::move(boundaries));
  }
  bool is_boundary(kvstore::SequenceId sequence) const override {
    return scorer_.is_boundary(sequence, store_.length(sequence));
  }
  BoundarySummary score_boundary(kvstore::SequenceId sequence) override;
  Result<kvstore::BoundaryKept> compress(kvstore::SequenceId sequence,
                                         kvstore::StageBoundary boundary, bool selects) override;
  void close_boundaries(kvstore::SequenceId sequence) override { scorer_.free(sequence); }
  StageClock& clock() override { return clock_; }

  const BoundaryScorer& scorer() const { return scorer_; }

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
  HostStageClock clock_;
  TokenTable token_table_;  // of the stage that has layer 0
  BoundaryScorer scorer_;

  std::vector<float> hidden_;  // [max_tokens, hidden]
  std::vector<float> logits_;  // [runs that want logits, vocab_size], last stage
  kernels::SampleWorkspace sample_workspace_;

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
