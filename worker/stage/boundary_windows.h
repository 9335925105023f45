#pragma once
// What scoring a boundary needs to know beside the scores, the same on every device: which queries
// belong to the observation window, which cached tokens are candidates, and where their scores are.

#include <cstdint>
#include <vector>

#include "kernels/kv_select.h"
#include "kvstore/head_cache.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::worker {

struct ScoringNeeds {
  kvstore::BoundaryNeeds boundary;
  kvstore::LazyTest lazy_test = kvstore::LazyTest::kPrefill;
  int sinks = 4;
  double boost_share = 0.25;
};

struct BoundarySummary {
  std::int64_t n_candidates = 0;
  std::vector<double> lazy_mass;                    // [n_layers] or empty
  std::vector<kernels::ScoreHistogram> histograms;  // [n_layers * n_kv_heads] or empty
};

struct PositionRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  std::int64_t size() const { return end - begin; }
  bool empty() const { return begin >= end; }
};

// The boundaries of one sequence, and which queries of the window before the next one are kept.
class BoundaryWindows {
 public:
  BoundaryWindows() = default;
  // Boundaries at these lengths of the sequence, ascending, all after its present length.
  BoundaryWindows(const ScoringNeeds& needs, std::vector<std::int32_t> boundaries)
      : needs_(needs), boundaries_(std::move(boundaries)) {}

  const ScoringNeeds& needs() const { return needs_; }
  bool is_boundary(std::int64_t n_tokens) const {
    return next_ < boundaries_.size() && boundaries_[next_] == n_tokens;
  }

  // The positions of a run whose queries the next boundary's window needs.
  PositionRange wanted(std::int64_t first_position, std::int64_t n_tokens) const;
  // Queries of the window are kept from this position on: a continued sequence may have begun
  // inside the window, and what came before has none.
  void keep_from(std::int64_t position) { first_query_ = position; }
  bool has_queries() const { return first_query_ >= 0; }
  std::int64_t first_query() const { return first_query_; }
  // Rows of the window with queries, kept or still to come.
  std::int64_t n_queries() const;

  // The boundary's window: those with queries, or the last positions where none are kept.
  PositionRange window() const;
  // At most this many tokens of a head are boosted (kv_score.h).
  std::int64_t max_boosted() const;
  // The boundary is done.
  void pass();

 private:
  ScoringNeeds needs_;
  std::vector<std::int32_t> boundaries_;
  std::size_t next_ = 0;
  std::int64_t first_query_ = -1;
};

// A head's candidates: new tokens before the window, sinks excluded, [first, end). They are in the
// tail, so the score of position p is `p - tail_first` columns after the tail's first.
PositionRange head_candidates(std::int64_t tail_first, int sinks, std::int64_t window_begin);

// How many of n_scores candidates from first_candidate on are chosen among: not those that the tail
// of `recent` tokens holds anyway.
std::int64_t n_selectable(const kvstore::HeadCache& cache, int recent, std::int64_t n_tokens,
                          std::int64_t first_candidate, std::int64_t n_scores);

}  // namespace spindle::worker
