#pragma once
// Which tokens stay, from their scores. Ties keep the lower position everywhere.
//
// Thread-safety: pure functions.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// Indices of the k highest scores, best first; all of them when k >= scores.size(), none when
// k <= 0. NaN counts as the lowest score, below -infinity; the zeros are equal. At most 2^31 - 1
// scores.
std::vector<std::int32_t> rank_top_k(std::span<const float> scores, std::int64_t k);

// The same indices, ascending.
std::vector<std::int32_t> select_top_k(std::span<const float> scores, std::int64_t k);

// SpindleKV: each query head's k best by mean attention; the KV head keeps the union, ascending.
std::vector<std::int32_t> select_union(ConstRows means,  // [group, n]
                                       std::int64_t k);

// Exact global top-k over heads in the given order; answers how many each head keeps. Ties go to
// the earlier head, then to the lower position. The oracle of the histogram form below.
std::vector<std::int64_t> global_top_k(std::span<const std::span<const float>> scores,
                                       std::int64_t k);

// A fixed histogram of one head's scores: bins of float bits >> 16 (128 per octave), positive
// scores only; zero, negative and NaN scores share bin 0.
struct ScoreHistogram {
  std::vector<std::uint16_t> bin;    // ascending, non-empty bins only
  std::vector<std::uint32_t> count;  // tokens in each
  std::int64_t total() const;
};
ScoreHistogram score_histogram(std::span<const float> scores);

// How many tokens each head keeps when the k best of all heads stay: everything above one bin, and
// of that bin the first heads' tokens first.
std::vector<std::int64_t> global_counts(std::span<const ScoreHistogram> heads, std::int64_t k);

// The same for many k of the same heads: their bins are summed up once, and each answer takes a few
// steps for each head. Borrows the histograms.
class GlobalCounts {
 public:
  explicit GlobalCounts(std::span<const ScoreHistogram* const> heads);
  std::vector<std::int64_t> at(std::int64_t k) const;

 private:
  std::vector<const ScoreHistogram*> heads_;
  std::vector<std::int64_t> from_bin_;  // [bins + 1]: all heads' tokens in b and above
  std::vector<std::vector<std::uint32_t>> from_row_;  // [head][rows + 1]: its own, by row
};

// SpindleKV's share of the context that layer `layer` of n_layers keeps (alpha 0.525, beta 0.05).
double spindlekv_layer_ratio(double context_ratio, int layer, int n_layers);

// PyramidKV's kept tokens of a layer, window included, original form: average budget
// n_tokens * ratio - window, beta 20.
std::int64_t pyramidkv_kept(std::int64_t n_tokens, double ratio, int window, int layer,
                            int n_layers);

// ---- CUDA bodies, device memory.

// One row of scores.
struct DeviceSelect {
  const float* scores = nullptr;
  std::int32_t n = 0;
  std::int32_t k = 0;
  std::int32_t* kept = nullptr;
  std::int32_t add = 0;  // added to every index written
};
// select_top_k of each row: the k best of scores[0 .. n), ascending, into kept[0 .. min(k, n));
// ties to the lower position, NaN last.
void select_top_k(const CudaContext& context,
                  const DeviceSelect* rows,  // device, [n_rows]
                  int n_rows);

inline constexpr int kScoreHistogramBins = 32768;  // of positive scores, and bin 0

// The score_histogram of each row as the sparse form's (bin, count) pairs: those of row r are
// entries[begin[r]] .. entries[begin[r] + size[r] - 1], ascending bins. Rows lie in any order; a
// row takes at most min(n, kScoreHistogramBins) entries. *n_entries is their number, and what would
// go past `capacity` is left out: the caller gives the sum of the bounds, or less and asks again.
struct DeviceHistogramEntry {
  std::uint32_t bin = 0;
  std::uint32_t count = 0;
};
struct DeviceHistograms {
  DeviceHistogramEntry* entries = nullptr;
  std::int64_t capacity = 0;
  std::uint32_t* begin = nullptr;      // [n_rows]
  std::uint32_t* size = nullptr;       // [n_rows]
  std::uint32_t* n_entries = nullptr;  // one
};
void score_histogram(const CudaContext& context,
                     const DeviceSelect* rows,  // device, [n_rows]; scores and n are read
                     int n_rows, const DeviceHistograms& out);

}  // namespace spindle::kernels
