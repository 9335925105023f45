#pragma once
// Multiple-choice knapsack on convex hulls: one option for each item, least total error within a
// byte limit, greedy by error saved per byte. Every total it passes on its way is optimal for the
// bytes it takes; between two of them it is off by at most one step.
//
// Thread-safety: pure functions.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace spindle::kvstore {

struct KnapsackOption {
  std::uint64_t bytes = 0;
  double error = 0;  // not finite: taken for the worst
};

// Indices of the lower convex hull: bytes ascend, errors fall ever more slowly. Never empty for a
// non-empty input; the first is the one of fewest bytes.
std::vector<std::size_t> convex_hull(std::span<const KnapsackOption> options);

// The option of each item. When even the smallest ones exceed the limit, they are the answer.
// Ties go to the earlier item.
std::vector<std::size_t> choose_options(std::span<const std::vector<KnapsackOption>> items,
                                        std::uint64_t limit);

}  // namespace spindle::kvstore
