#pragma once
// BoundaryScorer on a GPU: window queries and scores stay in device memory; what goes to the host
// are histograms, lazy masses and, once the plan came back, the positions that stay. A boundary is
// one upload of tables, a series of launches per layer, and one copy back.
//
// Memory is taken once, for a sequence of max_model_len tokens (scratch_bytes): window
// probabilities (n_heads * 32 rows), workspaces of the kernels, scores of boundaries whose plan is
// not back yet, and queries of a few sequences. Scores or queries that find no room there wait in
// host memory, which is slower and gives the same result.
//
// Owns the window queries and scores of open sequences; borrows store, pool and weights per call.
// The context outlives it.
// Thread-safety: none; the stage's thread.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/attention.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/tensor_view.h"
#include "kernels/kv_score.h"
#include "kernels/kv_select.h"
#include "kernels/linear.h"
#include "kernels/rope.h"
#include "kvstore/kv_store.h"
#include "kvstore/plan/kv_plan.h"
#include "worker/stage/boundary_windows.h"
#include "worker/stage/stage.h"

namespace spindle::worker {

class CudaBoundaryScorer {
 public:
  // Device memory that create() takes.
  static std::uint64_t scratch_bytes(const LlamaStageConfig& config,
                                     const kernels::AttentionShape& shape);
  static Result<std::unique_ptr<CudaBoundaryScorer>> create(const CudaContext& context,
                                                            const LlamaStageConfig& config,
                                                            const kernels::AttentionShape& shape);

  // As BoundaryScorer's.
  void open(kvstore::SequenceId sequence, const ScoringNeeds& needs,
            std::vector<std::int32_t> boundaries);
  void free(kvstore::SequenceId sequence);
  bool is_boundary(kvstore::SequenceId sequence, std::int64_t n_tokens) const;

  // Whether take_queries would keep rows of such a run.
  bool wants_queries(kvstore::SequenceId sequence, std::int64_t first_position,
                     std::int64_t n_tokens) const;
  // Keeps those rows of a run's queries [n, n_heads * head_dim], after RoPE and in device memory,
  // that lie in the observation window of the sequence's next boundary.
  void take_queries(kvstore::SequenceId sequence, int layer, std::int64_t first_position,
                    ConstF16Rows q);

  struct Inputs {
    kernels::DeviceKvPool pool;
    kernels::DeviceRope rope;
    std::span<const kernels::DeviceLinear* const> outputs;  // [n_layers], the output projections
    // Pages for the compressed blocks of one layer of the sequence.
    std::byte* expanded_pages = nullptr;
    std::size_t expanded_bytes = 0;
  };
  // Scores the boundary that the sequence just reached; the store's tables are up to date on the
  // device.
  BoundarySummary score(kvstore::SequenceId sequence, const kvstore::KvStore& store,
                        const Inputs& inputs);

  // The candidates that stay under the stage's plans, from the last score(); drops the scores.
  std::vector<std::vector<std::int32_t>> select(kvstore::SequenceId sequence,
                                                const kvstore::KvStore& store, int recent,
                                                std::span<const kvstore::HeadPlan> heads);

  // For tests: the scores of a head's candidates, [n_candidates] or [group][n_candidates].
  std::vector<float> head_scores(kvstore::SequenceId sequence, int layer, int kv_head) const;

 private:
  // Where the scratch's pieces lie.
  struct Layout {
    // f32 [n_heads * 32, max tokens]: probabilities, or the mean attention of all layers' kv heads;
    // then histograms and kept positions.
    std::uint64_t p = 0;
    std::uint64_t p_bytes = 0;
    std::uint64_t means = 0;  // f32 [n_heads, max tokens]
    std::uint64_t norms = 0;  // f32 [n_kv_heads, max tokens]
    std::uint64_t work = 0;   // workspace of one kernel
    std::uint64_t work_bytes = 0;
    std::uint64_t lazy = 0;         // f32 [n_layers, n_heads]
    std::uint64_t tables = 0;       // what an upload brings
    std::uint64_t boost = 0;        // DeviceBoostHead [n_layers, n_kv_heads]
    std::uint64_t window_mass = 0;  // f32 [n_layers, n_heads * 32]
    std::uint64_t best = 0;         // f32 [n_layers]
    std::uint64_t scores = 0;       // of boundaries in flight
    std::uint64_t scores_bytes = 0;
    std::uint64_t staged_queries = 0;  // f16 [32][n_heads * head_dim], a layer's from the host
    std::uint64_t queries = 0;         // f16 [slots][n_layers][32][n_heads * head_dim]
    std::uint64_t n_bytes = 0;
  };
  struct HeadScores {
    PositionRange candidates;
    std::int64_t column = 0;  // of the first candidate
  };
  struct Sequence {
    BoundaryWindows windows;
    int query_slot = -1;            // -1: in host_queries
    std::vector<F16> host_queries;  // [n_layers][n queries][n_heads * head_dim]
    // Of the last boundary, [n_layers * n_kv_heads * rows_per_head][stride] floats.
    std::vector<HeadScores> heads;  // [n_layers * n_kv_heads]
    std::int64_t rows_per_head = 1;
    std::int64_t stride = 0;
    std::optional<std::uint64_t> scores_at;  // in the arena
    std::vector<float> host_scores;          // when the arena had no room
    bool has_scores() const { return scores_at.has_value() || !host_scores.empty(); }
  };
  // What the store says about one boundary's sequence.
  struct Tables {
    std::vector<std::int64_t> n_slots;     // [n_layers * n_kv_heads]
    std::vector<std::int64_t> tail_first;  // the same
    std::vector<std::int64_t> first_page;  // the same, in its layer's expanded pages
    std::vector<std::int32_t> max_blocks;  // [n_layers], of any head
    std::vector<std::int64_t> n_pages;     // [n_layers], expanded
  };

  // Copies to the host go through page-locked memory of this size.
  static constexpr std::size_t kStagingBytes = std::size_t{16} << 20;

  CudaBoundaryScorer(const CudaContext& context, const LlamaStageConfig& config,
                     const kernels::AttentionShape& shape);
  static Layout layout_of(const LlamaStageConfig& config, const kernels::AttentionShape& shape);
  template <typename T>
  T* at(std::uint64_t offset) const {
    return reinterpret_cast<T*>(scratch_.data() + offset);
  }
  std::int64_t n_tables() const;
  std::int64_t group() const { return shape_.n_heads / shape_.n_kv_heads; }
  std::int64_t q_width() const { return std::int64_t{shape_.n_heads} * shape_.head_dim; }

  Tables tables_of(kvstore::SequenceId id, const kvstore::KvStore& store, bool tails_only) const;
  void score_layer(const Sequence& sequence, int layer, const kernels::DeviceScoreLayer& input,
                   const Inputs& inputs, Rows scores);
  void boost(const Sequence& sequence);
  std::uint64_t layer_scores_place(kvstore::KvSelector selector) const;
  const F16* layer_queries(const Sequence& sequence, int layer);
  void summarize(const Sequence& sequence, BoundarySummary& summary);
  std::vector<kernels::ScoreHistogram> histograms(const Sequence& sequence);
  void read_histograms(std::span<const kernels::DeviceSelect> rows, std::size_t worst_entries,
                       std::span<kernels::ScoreHistogram> histograms);
  const float* scores_of(const Sequence& sequence, std::int64_t row) const;
  void select_on_device(std::span<kernels::DeviceSelect> rows,
                        std::span<std::vector<std::int32_t>> kept);
  void read_back(void* target, const void* source, std::size_t n_bytes);

  void take_query_slot(Sequence& sequence);
  void take_scores(Sequence& sequence);
  void drop_queries(Sequence& sequence);
  void drop_scores(Sequence& sequence);

  const CudaContext& context_;
  kernels::AttentionShape shape_;
  int n_layers_ = 0;
  Layout layout_;
  DeviceBuffer scratch_;
  PinnedBuffer staging_;                               // for copies to the host
  std::vector<kernels::DeviceBoostHead> boost_heads_;  // still to do, of the present boundary
  std::vector<int> free_query_slots_;
  std::map<std::uint64_t, std::uint64_t> arena_;  // taken pieces: place -> bytes
  std::unordered_map<kvstore::SequenceId, Sequence> sequences_;
};

}  // namespace spindle::worker
