// DefensiveKV's part of kv_score.h: the worst case over queries, and the boost of what is surely
// attended to.
#include <algorithm>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"
#include "kernels/kv_score.h"
#include "kernels/kv_select.h"

namespace spindle::kernels {
namespace {

// Values worth a second thread, about 10 us.
constexpr std::int64_t kMinValuesPerThread = 1 << 15;
// Columns whose scores stay in the L1 cache while all rows pass.
constexpr std::int64_t kColumnBlock = 2048;
// The share of the attention whose tokens are kept before any worst case counts.
constexpr double kBoostedMass = 0.9;
// What a boosted token adds of its own score to the layer's highest, so that a cut through the
// boosted ones is not arbitrary.
constexpr float kOwnShare = 1e-3F;

std::int64_t size_of(std::span<const float> values) {
  return static_cast<std::int64_t>(values.size());
}

// The sum over [0, n) of x pooled by 5, given the sum of x: each value counts in five windows, less
// those that would be centred outside.
double pooled_sum(const float* x, std::int64_t n, double sum) {
  double lost = 0.0;
  for (std::int64_t i = 0; i < std::min<std::int64_t>(2, n); ++i) {
    const auto windows_outside = static_cast<double>(2 - i);
    lost += windows_outside * (static_cast<double>(x[i]) + static_cast<double>(x[n - 1 - i]));
  }
  return sum - lost / 5.0;
}

// Which factors turn sums over five columns into pooled rows of the same mass.
struct RowMasses {
  std::vector<float> factor;
  std::vector<double> window;

  explicit RowMasses(std::int64_t n_rows)
      : factor(static_cast<std::size_t>(n_rows)), window(static_cast<std::size_t>(n_rows)) {}
};

RowMasses row_masses(const CpuContext& context, ConstRows p, std::int64_t n_context) {
  const KernelTable& kernels = kernels_for(context);
  RowMasses masses(p.n_rows);
  context.parallel_for(
      p.n_rows, kMinValuesPerThread / p.width + 1, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
          const float* row = p.row(i);
          const auto at = static_cast<std::size_t>(i);
          const double mass = kernels.sum(row, n_context);
          const double pooled = pooled_sum(row, n_context, mass);
          masses.factor[at] = pooled > 0.0 ? static_cast<float>(mass / (5.0 * pooled)) : 0.0F;
          masses.window[at] = kernels.sum(row + n_context, p.width - n_context);
        }
      });
  return masses;
}

// How many of `ranked`, best first, come before the point where the normalised mean adds up to
// `target`.
std::size_t count_before(std::span<const std::int32_t> ranked, std::span<const float> mean,
                         double total, double target) {
  double mass = 0.0;
  std::size_t count = 0;
  for (const std::int32_t t : ranked) {
    mass += static_cast<double>(mean[static_cast<std::size_t>(t)]);
    if (!(mass < target * total)) break;
    ++count;
  }
  return count;
}

}  // namespace

void defensive_scores(const CpuContext& context, ConstRows p, int group, int window,
                      std::span<const float> norms, DefensiveHead& head) {
  const std::int64_t n_context = p.width - window;
  CHECK(group > 0 && window > 0 && p.n_rows == std::int64_t{group} * window && n_context >= 0,
        "defensive_scores rows");
  CHECK(size_of(head.score) == n_context && size_of(head.mean) == n_context &&
            size_of(norms) >= n_context,
        "defensive_scores columns");
  const RowMasses masses = row_masses(context, p, n_context);
  double window_mass = 0.0;
  for (const double mass : masses.window) window_mass += mass;
  head.window_mass = static_cast<float>(window_mass / static_cast<double>(p.n_rows));
  if (n_context == 0) return;

  window_mean(context, p.columns(0, n_context), head.mean);
  const KernelTable& kernels = kernels_for(context);
  const std::int64_t n_blocks = (n_context + kColumnBlock - 1) / kColumnBlock;
  const std::int64_t grain = kMinValuesPerThread / (p.n_rows * kColumnBlock) + 1;
  context.parallel_for(n_blocks, grain, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t begin = block * kColumnBlock;
      const std::int64_t end = std::min(begin + kColumnBlock, n_context);
      std::fill(head.score.begin() + begin, head.score.begin() + end, 0.0F);
      for (std::int64_t i = 0; i < p.n_rows; ++i) {
        kernels.pooled_max_into(p.row(i), n_context, begin, end,
                                masses.factor[static_cast<std::size_t>(i)],
                                head.score.data() + begin);
      }
    }
  });
  const auto floor = static_cast<float>(kernels.sum(head.score.data(), n_context) /
                                        static_cast<double>(n_context));
  for (std::size_t t = 0; t < head.score.size(); ++t) {
    head.score[t] = std::max(head.score[t], floor) * norms[t];
  }
}

void defensive_boost(std::span<DefensiveHead> heads, std::int64_t max_boosted) {
  double window_mass = 0.0;
  float best = 0.0F;
  for (const DefensiveHead& head : heads) {
    CHECK(head.score.size() == head.mean.size(), "defensive_boost columns");
    window_mass += static_cast<double>(head.window_mass) / static_cast<double>(heads.size());
    for (const float score : head.score) best = score > best ? score : best;
  }
  for (const DefensiveHead& head : heads) {
    const std::vector<std::int32_t> ranked = rank_top_k(head.mean, max_boosted);
    double total = 0.0;
    for (const float mean : head.mean) total += static_cast<double>(mean);
    const std::size_t count = count_before(ranked, head.mean, total, kBoostedMass - window_mass);
    for (const std::int32_t t : std::span(ranked).first(count)) {
      float& score = head.score[static_cast<std::size_t>(t)];
      score = best + kOwnShare * score;
    }
  }
}

}  // namespace spindle::kernels
