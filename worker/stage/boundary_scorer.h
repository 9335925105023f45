#pragma once
// What a stage computes at the end of a prompt segment: the scores of its cached tokens by the
// queries of the observation window, the summaries that rank 0 plans with, and, once the plan came
// back, which tokens each head keeps. The scores live from the run that reached the boundary to the
// plan that carries it out.
//
// Scores are recomputed from the window's queries and the cache (kernels/kv_score.h), so they do
// not depend on how the prompt was cut into chunks.
//
// Owns the window queries and scores of open sequences; borrows context, store and weights per
// call. Thread-safety: none; the stage's thread.

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/kv_select.h"
#include "kernels/linear.h"
#include "kernels/rope.h"
#include "kvstore/kv_store.h"
#include "kvstore/plan/kv_plan.h"
#include "worker/stage/boundary_windows.h"

namespace spindle::worker {

class BoundaryScorer {
 public:
  struct Shape {
    int n_layers = 0;
    int n_heads = 0;
    int n_kv_heads = 0;
    int head_dim = 0;
  };
  explicit BoundaryScorer(const Shape& shape) : shape_(shape) {}

  // Boundaries at these lengths of the sequence, ascending, all after its present length.
  void open(kvstore::SequenceId sequence, const ScoringNeeds& needs,
            std::vector<std::int32_t> boundaries);
  void free(kvstore::SequenceId sequence) { sequences_.erase(sequence); }

  // Keeps those rows of a run's queries [n, n_heads * head_dim], after RoPE, that lie in the
  // observation window of the sequence's next boundary.
  void take_queries(kvstore::SequenceId sequence, int layer, std::int64_t first_position,
                    ConstRows q);

  // Whether the sequence's next boundary is at n_tokens.
  bool is_boundary(kvstore::SequenceId sequence, std::int64_t n_tokens) const;

  // Scores the boundary that the sequence just reached. `outputs[layer]` are the layers' output
  // projections.
  BoundarySummary score(const CpuContext& context, kvstore::SequenceId sequence,
                        const kvstore::KvStore& store, const kernels::RopeTable& rope,
                        std::span<const kernels::PackedLinear* const> outputs);

  // The candidates that stay under the stage's plans, from the last score(); drops the scores.
  // Candidates that the tail of `recent` tokens holds anyway are not chosen among.
  std::vector<std::vector<std::int32_t>> select(kvstore::SequenceId sequence,
                                                const kvstore::KvStore& store, int recent,
                                                std::span<const kvstore::HeadPlan> heads);

  // For tests: the scores of a head's candidates, the first of which is at `first_candidate`.
  struct HeadScores {
    std::int64_t first_candidate = 0;
    std::vector<float> scores;  // [n_candidates], or [group][n_candidates] for kSpindleKv
  };
  const HeadScores& head_scores(kvstore::SequenceId sequence, int layer, int kv_head) const;

 private:
  struct Sequence {
    BoundaryWindows windows;
    std::vector<float> queries;      // [n_layers][window][n_heads * head_dim]
    std::vector<HeadScores> scores;  // [n_layers * n_kv_heads]
  };
  struct LayerWork;

  void score_layer(const CpuContext& context, LayerWork& work);
  void score_head(const CpuContext& context, LayerWork& work, int head);

  Shape shape_;
  std::unordered_map<kvstore::SequenceId, Sequence> sequences_;
};

}  // namespace spindle::worker
