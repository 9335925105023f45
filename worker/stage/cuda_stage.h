#pragma once
// The GPU body of Stage: products of bf16 weights and bf16 activations with fp32 accumulation, fp32
// residual stream. What the products of q, k, v, gate and up give stays fp32 until it is rotated or
// gated: its rounding to bf16 would be most of the error of a logit.
//
// A step's tables go to the device in one copy; then every layer is a series of launches on the
// context's stream. A step of decode tokens alone is replayed from a CUDA graph, one for each
// bucket of sequences and combination of KV formats in the layers: those of uncompressed caches are
// recorded at start, others after their first step. Rows that fill a bucket up compute nothing that
// is read. Rows of a mixed step take the decode kernel when their run has one token and the prefill
// kernel otherwise; the compressed blocks of a sequence that prefills are expanded, a layer at a
// time, into pages that the prefill kernel reads like any other.
//
// Products' algorithms depend on the number of rows, so the last bits of a row may depend on its
// batch, unlike on the CPU.

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "kernels/core/cuda_context.h"
#include "kernels/cuda/cuda_graph.h"
#include "kernels/sample.h"
#include "kvstore/kv_store.h"
#include "worker/stage/cuda_boundary_scorer.h"
#include "worker/stage/cuda_stage_clock.h"
#include "worker/stage/cuda_weights.h"
#include "worker/stage/stage.h"
#include "worker/stage/step_upload.h"

struct CUevent_st;

namespace spindle::worker {

// Owns the weights and the workspace; does not own the context, which must outlive it, and the
// store. Thread-safety: none; one stage thread owns it together with its context and store.
class CudaStage final : public Stage {
 public:
  // Weights and workspace go to the device here, before the KV pool takes what is left.
  static Result<std::unique_ptr<CudaStage>> create(const LlamaStageConfig& config,
                                                   model::LlamaStageWeights weights,
                                                   const CudaContext& context);
  ~CudaStage() override;

  const kernels::DeviceRope& rope() const { return weights_.rope; }
  // Device memory for scores and expanded blocks, taken by use_store(): what must be left free when
  // the pool is sized.
  std::uint64_t reserved_bytes() const;
  // The store on this context's device, before the first step; it outlives the stage. Records the
  // graphs of decode steps.
  Status use_store(kvstore::KvStore& store);

  void bind_thread() override;
  const LlamaStageConfig& config() const override { return config_; }
  std::uint64_t weight_bytes() const override { return weights_.n_bytes; }
  std::span<std::byte> activations(std::int64_t n_tokens) override;
  Status forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens) override;
  Status sample(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                const std::function<bool()>& meanwhile) override;
  Result<std::span<const float>> logits(std::int64_t row) override;
  Status prompt_logits(std::int64_t first_row, Rows logits) override;
  void open_boundaries(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                       std::vector<std::int32_t> boundaries) override;
  bool is_boundary(kvstore::SequenceId sequence) const override;
  BoundarySummary score_boundary(kvstore::SequenceId sequence) override;
  Result<kvstore::BoundaryKept> compress(kvstore::SequenceId sequence,
                                         kvstore::StageBoundary boundary, bool selects) override;
  void close_boundaries(kvstore::SequenceId sequence) override;
  StageClock& clock() override { return clock_; }

 private:
  // The arrays of one step, in device memory unless they say host.
  struct Step {
    std::int64_t n_rows = 0;
    std::int64_t n_logits = 0;
    std::int32_t* tokens = nullptr;                // [n_rows]
    std::int32_t* positions = nullptr;             // [n_rows]
    std::int32_t* row_sequence = nullptr;          // [n_rows]
    std::int32_t* logits_rows = nullptr;           // [n_logits]
    kernels::DeviceSequence* sequences = nullptr;  // decode first, then prefill
    int n_decode = 0;
    // Host, [n_layers]: formats of the decode sequences' blocks, and so the kernel that reads them.
    std::vector<kernels::DecodeFormats> formats = {};
    std::span<const std::int32_t> n_queries;  // host: of the prefill sequences without blocks
    std::span<const StageRun> runs;           // host: empty in a recorded step
  };
  // A prefill sequence with blocks: expanded and attended by itself, after those without.
  struct ExpandedRun {
    std::int32_t n_queries = 0;
    std::int64_t* first_page = nullptr;         // device, [n_layers][n_kv_heads]
    std::vector<std::int32_t> max_blocks = {};  // host, [n_layers]
  };
  struct Sampling {
    PinnedBuffer sampled;  // [capacity] DeviceSampled
    DeviceBuffer device;   // the same
    DeviceBuffer workspace;
    CUevent_st* drawn = nullptr;  // the tokens are in `sampled`
    std::size_t capacity = 0;     // rows of one call
  };

  CudaStage(const LlamaStageConfig& config, const CudaContext& context, CudaWeights weights);
  Status allocate();
  Status record_graphs();
  void record(const Step& step);
  void run_step(const Step& step);
  void run_layer(int layer, const Step& step);
  void attend(int layer, const Step& step);
  void take_queries(int layer, const Step& step);
  void project_logits(const Step& step);
  void fill_decode(Step& step, std::span<const StageRun> runs, std::span<const std::int32_t> tokens,
                   std::int64_t n_rows);
  void fill_mixed(Step& step, std::span<const StageRun> runs, std::span<const std::int32_t> tokens);
  // Formats of the sequence's blocks, [n_layers] of bits 1 << KvFormat; looked up once after each
  // boundary.
  const std::vector<std::uint32_t>& formats_of(kvstore::SequenceId sequence);
  void set_formats(Step& step, std::span<const StageRun> decode_runs);
  ExpandedRun plan_expansion(kvstore::SequenceId sequence, std::int32_t n_queries);
  Status sample_batch(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                      const std::function<bool()>& meanwhile);
  kernels::AttentionShape shape() const;
  float scale() const;

  LlamaStageConfig config_;
  const CudaContext& context_;
  CudaWeights weights_;
  kvstore::KvStore* store_ = nullptr;
  kernels::DeviceKvPool pool_;
  std::unique_ptr<CudaBoundaryScorer> scorer_;

  // Workspace for max_batched_tokens rows.
  DeviceBuffer hidden_;     // f32 [max_tokens, hidden]
  DeviceBuffer normed_;     // bf16 [max_tokens, hidden]
  DeviceBuffer qkv_;        // f32 [max_tokens, (n_heads + 2 n_kv_heads) * head_dim]
  DeviceBuffer q_;          // f16 [max_tokens, n_heads * head_dim]
  DeviceBuffer attended_;   // bf16 [max_tokens, n_heads * head_dim]
  DeviceBuffer gate_up_;    // f32 [max_tokens, 2 * intermediate]
  DeviceBuffer activated_;  // bf16 [max_tokens, intermediate]
  // Last stage.
  DeviceBuffer sampled_hidden_;  // f32 [max logits rows, hidden]
  DeviceBuffer sampled_normed_;  // bf16 [max logits rows, hidden]
  DeviceBuffer logits_;          // f32 [max_num_seqs, vocab_size]
  DeviceBuffer prompt_logits_;   // f32 [kPromptRows, vocab_size]
  PinnedBuffer host_logits_;     // [vocab_size]
  Sampling sampling_;
  std::optional<kernels::DecodeWorkspace> decode_workspace_;
  DeviceBuffer expanded_pages_;  // of one sequence and layer

  std::optional<StepUpload> decode_upload_;
  std::optional<StepUpload> mixed_upload_;
  std::optional<StepUpload> sample_upload_;
  // By rows and formats of the layers.
  using GraphKey = std::pair<std::int64_t, std::vector<kernels::DecodeFormats>>;
  std::map<GraphKey, CudaGraph> decode_graphs_;
  std::vector<std::int64_t> buckets_;  // ascending
  std::unordered_map<kvstore::SequenceId, std::vector<std::uint32_t>> formats_;
  std::vector<std::int32_t> positions_;
  std::vector<std::int32_t> n_queries_;
  std::vector<ExpandedRun> expanded_runs_;
  std::vector<std::int32_t> logits_row_of_;  // row of logits_ of the i-th run that wants logits
  CudaStageClock clock_;
};

}  // namespace spindle::worker
