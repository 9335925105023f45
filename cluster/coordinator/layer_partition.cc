#include "cluster/coordinator/layer_partition.h"

#include <algorithm>
#include <limits>
#include <string>

namespace spindle::coordinator {
namespace {

double stage_cost(const PartitionCosts& costs, int count, bool is_first, bool is_last) {
  return costs.layer * count + (is_first ? costs.embedding : 0.0) + (is_last ? costs.head : 0.0);
}

Status check_counts(int n_layers, int n_stages) {
  if (n_stages < 1 || n_layers < n_stages) {
    return invalid_argument("a model of " + std::to_string(n_layers) +
                            " layers cannot be split over " + std::to_string(n_stages) +
                            " stages; start at most one rank per layer");
  }
  return ok_status();
}

}  // namespace

Result<std::vector<LayerRange>> partition_layers(int n_layers, int n_stages,
                                                 const PartitionCosts& costs) {
  if (Status status = check_counts(n_layers, n_stages); !status.ok()) return status;
  const auto stages = static_cast<std::size_t>(n_stages);
  const auto layers = static_cast<std::size_t>(n_layers);
  // best[s][l]: smallest possible largest cost when stages s.. own the layers l..
  std::vector best(stages, std::vector(layers + 1, std::numeric_limits<double>::infinity()));
  std::vector choice(stages, std::vector<int>(layers + 1, 0));
  for (std::size_t s = stages; s-- > 0;) {
    const bool is_last = s + 1 == stages;
    for (std::size_t l = 0; l < layers; ++l) {
      const int rest = static_cast<int>(layers - l);
      // Larger counts first, so that a tie keeps the larger earlier stage.
      for (int count = rest; count >= 1; --count) {
        if (is_last && count != rest) break;
        const double own = stage_cost(costs, count, s == 0, is_last);
        const double after = is_last ? 0.0 : best[s + 1][l + static_cast<std::size_t>(count)];
        const double cost = std::max(own, after);
        if (cost < best[s][l]) {
          best[s][l] = cost;
          choice[s][l] = count;
        }
      }
    }
  }
  std::vector<LayerRange> ranges;
  int first = 0;
  for (std::size_t s = 0; s < stages; ++s) {
    const int count = choice[s][static_cast<std::size_t>(first)];
    ranges.push_back({first, count});
    first += count;
  }
  CHECK(first == n_layers, "the stages cover all layers");
  return ranges;
}

Result<std::vector<LayerRange>> partition_as_told(int n_layers, int n_stages,
                                                  std::span<const int> layers_per_stage) {
  if (Status status = check_counts(n_layers, n_stages); !status.ok()) return status;
  std::vector<LayerRange> ranges;
  std::int64_t sum = 0;
  for (const int count : layers_per_stage) {
    if (count < 1 || count > n_layers) {
      return invalid_argument("cluster.layers_per_stage: a stage of " + std::to_string(count) +
                              " layers");
    }
    ranges.push_back({static_cast<int>(sum), count});
    sum += count;
  }
  if (layers_per_stage.size() != static_cast<std::size_t>(n_stages)) {
    return invalid_argument("cluster.layers_per_stage has " +
                            std::to_string(layers_per_stage.size()) + " entries for " +
                            std::to_string(n_stages) + " ranks");
  }
  if (sum != n_layers) {
    return invalid_argument("cluster.layers_per_stage sums to " + std::to_string(sum) +
                            ", the model has " + std::to_string(n_layers) + " layers");
  }
  return ranges;
}

}  // namespace spindle::coordinator
