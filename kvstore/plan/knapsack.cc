#include "kvstore/plan/knapsack.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/core/check.h"

namespace spindle::kvstore {
namespace {

constexpr double kWorstError = 1e9;

double error_of(const KnapsackOption& option) {
  return std::isfinite(option.error) ? option.error : kWorstError;
}

// Error saved per byte by going from one option to a larger one.
double gain(const KnapsackOption& from, const KnapsackOption& to) {
  return (error_of(from) - error_of(to)) / static_cast<double>(to.bytes - from.bytes);
}

}  // namespace

std::vector<std::size_t> convex_hull(std::span<const KnapsackOption> options) {
  std::vector<std::size_t> order(options.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    if (options[a].bytes != options[b].bytes) return options[a].bytes < options[b].bytes;
    return error_of(options[a]) < error_of(options[b]);
  });
  std::vector<std::size_t> hull;
  for (const std::size_t i : order) {
    if (!hull.empty() && error_of(options[i]) >= error_of(options[hull.back()])) continue;
    while (hull.size() >= 2) {
      const KnapsackOption& last = options[hull.back()];
      const KnapsackOption& before = options[hull[hull.size() - 2]];
      if (gain(before, last) > gain(last, options[i])) break;
      hull.pop_back();
    }
    hull.push_back(i);
  }
  return hull;
}

std::vector<std::size_t> choose_options(std::span<const std::vector<KnapsackOption>> items,
                                        std::uint64_t limit) {
  struct Item {
    std::vector<std::size_t> hull;
    std::size_t at = 0;
    bool closed = false;
  };
  std::vector<Item> state;
  std::uint64_t bytes = 0;
  for (const auto& options : items) {
    CHECK(!options.empty(), "an item of the knapsack has no option");
    state.push_back({convex_hull(options)});
    bytes += options[state.back().hull.front()].bytes;
  }
  for (;;) {
    std::size_t best = items.size();
    double best_gain = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      const Item& item = state[i];
      if (item.closed || item.at + 1 == item.hull.size()) continue;
      const double step = gain(items[i][item.hull[item.at]], items[i][item.hull[item.at + 1]]);
      if (step > best_gain) {
        best = i;
        best_gain = step;
      }
    }
    if (best == items.size()) break;
    Item& item = state[best];
    const std::uint64_t more =
        items[best][item.hull[item.at + 1]].bytes - items[best][item.hull[item.at]].bytes;
    if (bytes + more > limit) {
      item.closed = true;  // a smaller step of another item may still fit
      continue;
    }
    bytes += more;
    ++item.at;
  }
  std::vector<std::size_t> chosen;
  for (const Item& item : state) chosen.push_back(item.hull[item.at]);
  return chosen;
}

}  // namespace spindle::kvstore
