#pragma once
// Which layers each stage owns: contiguous ranges that make the slowest stage as fast as possible.
// Pure functions.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::coordinator {

struct LayerRange {
  int first = 0;
  int count = 0;
  bool operator==(const LayerRange&) const = default;
};

// Relative cost of the parts of a step. Decode is bound by the weights that are read, so bytes of
// weights are a good measure; any unit will do.
struct PartitionCosts {
  double layer = 1.0;
  double embedding = 0.0;  // on the first stage
  double head = 0.0;       // final norm, head and sampling, on the last stage
};

// The partition that minimises the largest stage cost; among equals the one with the larger earlier
// stages. Needs 1 <= n_stages <= n_layers.
Result<std::vector<LayerRange>> partition_layers(int n_layers, int n_stages,
                                                 const PartitionCosts& costs);

// The ranges of an explicit `layers_per_stage`; refused unless it has n_stages entries, each at
// least 1, that sum to n_layers.
Result<std::vector<LayerRange>> partition_as_told(int n_layers, int n_stages,
                                                  std::span<const int> layers_per_stage);

}  // namespace spindle::coordinator
