#include "kernels/kv_select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "kernels/core/check.h"

namespace spindle::kernels {
namespace {

constexpr std::size_t kBins = 1 << 16;
// SpindleKV, and PyramidKV's ratio of the average to the smallest budget.
constexpr double kSpindleAlpha = 0.525;
constexpr double kSpindleBeta = 0.05;
constexpr double kPyramidBeta = 20.0;

// Unsigned integers in the order of the scores: NaN 0, then -infinity to infinity.
std::uint32_t order_of(float score) {
  if (std::isnan(score)) return 0;
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0F);  // -0 becomes 0
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

// Higher is better, and lower positions are better among equal scores.
std::uint64_t rank_key(float score, std::size_t position) {
  return std::uint64_t{order_of(score)} << 32 | static_cast<std::uint32_t>(~position);
}

// Linear over the layers: layer 0 has `first`, the last one `last`.
double ramp(double first, double last, int layer, int n_layers) {
  CHECK(layer >= 0 && layer < n_layers, "layer outside the model");
  if (n_layers == 1) return (first + last) / 2.0;
  return first + (last - first) * layer / (n_layers - 1);
}

}  // namespace

std::vector<std::int32_t> rank_top_k(std::span<const float> scores, std::int64_t k) {
  CHECK(scores.size() <= std::numeric_limits<std::int32_t>::max(), "too many scores");
  const auto n = static_cast<std::int64_t>(scores.size());
  const std::int64_t count = std::clamp<std::int64_t>(k, 0, n);
  std::vector<std::uint64_t> keys(scores.size());
  for (std::size_t t = 0; t < keys.size(); ++t) keys[t] = rank_key(scores[t], t);
  const auto end = keys.begin() + count;
  if (count > 0 && count < n) std::nth_element(keys.begin(), end - 1, keys.end(), std::greater<>());
  std::sort(keys.begin(), end, std::greater<>());
  std::vector<std::int32_t> ranked(static_cast<std::size_t>(count));
  std::transform(keys.begin(), end, ranked.begin(), [](std::uint64_t key) {
    return static_cast<std::int32_t>(~static_cast<std::uint32_t>(key));
  });
  return ranked;
}

std::vector<std::int32_t> select_top_k(std::span<const float> scores, std::int64_t k) {
  std::vector<std::int32_t> kept = rank_top_k(scores, k);
  std::sort(kept.begin(), kept.end());
  return kept;
}

std::vector<std::int32_t> select_union(ConstRows means, std::int64_t k) {
  std::vector<bool> kept(static_cast<std::size_t>(means.width));
  for (std::int64_t h = 0; h < means.n_rows; ++h) {
    for (const std::int32_t t :
         rank_top_k({means.row(h), static_cast<std::size_t>(means.width)}, k)) {
      kept[static_cast<std::size_t>(t)] = true;
    }
  }
  std::vector<std::int32_t> indices;
  for (std::size_t t = 0; t < kept.size(); ++t) {
    if (kept[t]) indices.push_back(static_cast<std::int32_t>(t));
  }
  return indices;
}

std::vector<std::int64_t> global_top_k(std::span<const std::span<const float>> scores,
                                       std::int64_t k) {
  std::vector<std::uint32_t> orders;
  for (const auto& head : scores) {
    std::transform(head.begin(), head.end(), std::back_inserter(orders), order_of);
  }
  const auto total = static_cast<std::int64_t>(orders.size());
  const std::int64_t count = std::clamp<std::int64_t>(k, 0, total);
  std::vector<std::int64_t> kept(scores.size(), 0);
  if (count == 0) return kept;
  const auto worst = orders.begin() + (count - 1);
  std::nth_element(orders.begin(), worst, orders.end(), std::greater<>());
  const std::uint32_t threshold = *worst;
  std::int64_t left = count;
  for (std::size_t h = 0; h < scores.size(); ++h) {
    kept[h] = std::count_if(scores[h].begin(), scores[h].end(),
                            [&](float score) { return order_of(score) > threshold; });
    left -= kept[h];
  }
  for (std::size_t h = 0; h < scores.size() && left > 0; ++h) {
    const std::int64_t ties = std::count_if(scores[h].begin(), scores[h].end(), [&](float score) {
      return order_of(score) == threshold;
    });
    const std::int64_t taken = std::min(ties, left);
    kept[h] += taken;
    left -= taken;
  }
  return kept;
}

std::int64_t ScoreHistogram::total() const {
  std::int64_t sum = 0;
  for (const std::uint32_t n : count) sum += n;
  return sum;
}

ScoreHistogram score_histogram(std::span<const float> scores) {
  std::vector<std::uint32_t> counts(kBins, 0);
  for (const float score : scores) {
    const std::uint32_t bits = score > 0.0F ? std::bit_cast<std::uint32_t>(score) : 0;
    ++counts[bits >> 16];
  }
  ScoreHistogram histogram;
  for (std::size_t bin = 0; bin < kBins; ++bin) {
    if (counts[bin] == 0) continue;
    histogram.bin.push_back(static_cast<std::uint16_t>(bin));
    histogram.count.push_back(counts[bin]);
  }
  return histogram;
}

GlobalCounts::GlobalCounts(std::span<const ScoreHistogram* const> heads)
    : heads_(heads.begin(), heads.end()), from_bin_(kBins + 1) {
  for (const ScoreHistogram* head : heads_) {
    CHECK(head->bin.size() == head->count.size(), "a histogram has one count per bin");
    std::vector<std::uint32_t>& from = from_row_.emplace_back(head->bin.size() + 1);
    for (std::size_t i = head->bin.size(); i-- > 0;) {
      from[i] = from[i + 1] + head->count[i];
      from_bin_[head->bin[i]] += head->count[i];
    }
  }
  for (std::size_t bin = kBins; bin-- > 0;) from_bin_[bin] += from_bin_[bin + 1];
}

std::vector<std::int64_t> GlobalCounts::at(std::int64_t k) const {
  const std::int64_t wanted = std::max<std::int64_t>(k, 0);
  // The bin that the k-th best token is in, and how many of it stay; k of all leaves bin 0 whole.
  const auto above = std::partition_point(from_bin_.begin() + 1, from_bin_.end() - 1,
                                          [&](std::int64_t tokens) { return tokens > wanted; });
  const auto threshold = static_cast<std::size_t>(above - from_bin_.begin()) - 1;
  std::int64_t left = wanted - from_bin_[threshold + 1];

  std::vector<std::int64_t> kept;
  kept.reserve(heads_.size());
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    const std::vector<std::uint16_t>& bins = heads_[h]->bin;
    const auto row = static_cast<std::size_t>(
        std::lower_bound(bins.begin(), bins.end(), threshold) - bins.begin());
    const bool has_threshold = row < bins.size() && bins[row] == threshold;
    const std::int64_t whole = from_row_[h][row + (has_threshold ? 1 : 0)];
    const std::int64_t part =
        has_threshold ? std::min<std::int64_t>(heads_[h]->count[row], left) : 0;
    left -= part;
    kept.push_back(whole + part);
  }
  return kept;
}

std::vector<std::int64_t> global_counts(std::span<const ScoreHistogram> heads, std::int64_t k) {
  std::vector<const ScoreHistogram*> borrowed;
  for (const ScoreHistogram& head : heads) borrowed.push_back(&head);
  return GlobalCounts(borrowed).at(k);
}

double spindlekv_layer_ratio(double context_ratio, int layer, int n_layers) {
  const double ratio = std::clamp(context_ratio, 0.0, 1.0);
  if (ratio < kSpindleBeta) return ratio;
  if (ratio <= kSpindleAlpha)
    return ramp(2.0 * ratio - kSpindleBeta, kSpindleBeta, layer, n_layers);
  return ramp(1.0, 2.0 * ratio - 1.0, layer, n_layers);
}

std::int64_t pyramidkv_kept(std::int64_t n_tokens, double ratio, int window, int layer,
                            int n_layers) {
  if (n_tokens <= window) return n_tokens;
  const auto context = static_cast<double>(n_tokens - window);
  const double average = std::clamp(static_cast<double>(n_tokens) * ratio - window, 0.0, context);
  double least = average / kPyramidBeta;
  double most = 2.0 * average - least;
  if (most >= context) {
    most = context;
    least = 2.0 * average - most;
  }
  // Half to even, as the reference rounds.
  return window + static_cast<std::int64_t>(std::nearbyint(ramp(most, least, layer, n_layers)));
}

}  // namespace spindle::kernels
