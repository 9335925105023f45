#include "cluster/coordinator/level_choice.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "kvstore/plan/knapsack.h"

namespace spindle::coordinator {
namespace {

// What rounding may cost.
constexpr double kTolerance = 1e-9;

}  // namespace

double requests_that_fit(const StageLoad& stage, int level) {
  const double bytes = stage.bytes[static_cast<std::size_t>(level)];
  const double first = std::max(stage.peak, stage.n_at_peak * bytes);
  if (stage.capacity < first) return stage.n_at_peak * stage.capacity / first;
  return stage.n_at_peak + (stage.capacity - first) / bytes;
}

double bytes_of_requests(const StageLoad& stage, int level, double n_requests) {
  const double bytes = stage.bytes[static_cast<std::size_t>(level)];
  return std::max(stage.peak, stage.n_at_peak * bytes) +
         std::max(n_requests - stage.n_at_peak, 0.0) * bytes;
}

LevelChoice choose_level(const StageLoad& stage, int lightest, double n_requests) {
  const auto fits = [&](int level) {
    return requests_that_fit(stage, level) >= n_requests * (1.0 - kTolerance);
  };
  std::vector<kvstore::KnapsackOption> options;
  for (std::size_t l = static_cast<std::size_t>(lightest); l < stage.bytes.size(); ++l) {
    options.push_back({static_cast<std::uint64_t>(std::llround(stage.bytes[l])), stage.error[l]});
  }
  const std::vector<std::size_t> hull = kvstore::convex_hull(options);  // strong to light
  LevelChoice choice{.level = lightest, .fits = fits(lightest)};
  if (choice.fits) return choice;
  // The first level that the price has not left yet.
  int lighter = lightest;
  for (std::size_t h = hull.size(); h-- > 0;) {
    choice.level = lightest + static_cast<int>(hull[h]);
    choice.fits = fits(choice.level);
    if (h + 1 < hull.size()) {
      const kvstore::KnapsackOption& from = options[hull[h + 1]];
      const kvstore::KnapsackOption& to = options[hull[h]];
      choice.price = (to.error - from.error) / static_cast<double>(from.bytes - to.bytes);
    }
    if (choice.fits) break;
    lighter = choice.level + 1;
  }
  if (!choice.fits) return choice;
  for (int level = lighter; level < choice.level; ++level) {
    if (!fits(level)) continue;
    choice.level = level;
    break;
  }
  return choice;
}

}  // namespace spindle::coordinator
