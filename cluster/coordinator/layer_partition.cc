#include "cluster/coordinator/layer_partition.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace spindle::coordinator {
namespace {

constexpr std::int64_t kMaxBytes = std::int64_t{1} << 50;
constexpr double kMaxTime = 1125899906842624.0;  // 2^50
constexpr std::size_t kMaxLayers = 4096;
constexpr double kMaxTolerance = 100;
constexpr double kMaxKvWeight = 8;  // tokens to this power are still a number
constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kDoesNotFit = -1;

Status check_part(const PartCost& part, const std::string& what) {
  if (!(part.time >= 0 && part.time <= kMaxTime)) {
    return invalid_argument("the time of " + what + " is " + std::to_string(part.time));
  }
  for (const std::int64_t bytes : {part.weight_bytes, part.kv_bytes_per_token}) {
    if (bytes < 0 || bytes > kMaxBytes) {
      return invalid_argument("the size of " + what + " is " + std::to_string(bytes) + " bytes");
    }
  }
  return ok_status();
}

Status check_device(const StageDevice& device, std::size_t stage) {
  const std::string what = "stage " + std::to_string(stage);
  if (!(device.speed >= 1 / kMaxTime && device.speed <= kMaxTime)) {
    return invalid_argument("the speed of " + what + " is " + std::to_string(device.speed));
  }
  for (const std::int64_t bytes : {device.memory_bytes, device.kv_bytes, device.workspace_bytes}) {
    if (bytes < 0 || bytes > kMaxBytes) {
      return invalid_argument("the memory of " + what + " is " + std::to_string(bytes) + " bytes");
    }
  }
  return ok_status();
}

Status check_problem(const PartitionProblem& problem) {
  const std::size_t n_layers = problem.layers.size();
  const std::size_t n_stages = problem.devices.size();
  if (n_stages < 1 || n_layers < n_stages) {
    return invalid_argument("a model of " + std::to_string(n_layers) +
                            " layers cannot be split over " + std::to_string(n_stages) +
                            " stages; start at most one rank per layer");
  }
  if (n_layers > kMaxLayers) return invalid_argument(std::to_string(n_layers) + " layers");
  double sum = problem.embedding.time + problem.head.time;
  Status status = check_part(problem.embedding, "the embedding");
  if (status.ok()) status = check_part(problem.head, "the head");
  for (std::size_t i = 0; i < n_layers && status.ok(); ++i) {
    status = check_part(problem.layers[i], "layer " + std::to_string(i));
    sum += problem.layers[i].time;
  }
  for (std::size_t i = 0; i < n_stages && status.ok(); ++i) {
    status = check_device(problem.devices[i], i);
  }
  if (!status.ok()) return status;
  if (!(sum > 0)) return invalid_argument("no part of the model takes any time");
  if (problem.min_kv_tokens < 0 || problem.max_kv_tokens < 0 || problem.min_kv_tokens > kMaxBytes ||
      problem.max_kv_tokens > kMaxBytes) {
    return invalid_argument("KV tokens are negative or beyond 2^50");
  }
  if (!(problem.tolerance >= 0 && problem.tolerance <= kMaxTolerance && problem.kv_weight >= 0 &&
        problem.kv_weight <= kMaxKvWeight)) {
    return invalid_argument("tolerance is from 0 to 100, kv_weight from 0 to 8");
  }
  return ok_status();
}

// Answers for any range of layers [first, end) on any stage. All of them only get worse when a
// layer is added to a range.
class StageCosts {
 public:
  explicit StageCosts(const PartitionProblem& problem) : problem_(problem) {
    double sum = problem.embedding.time + problem.head.time;
    for (const PartCost& layer : problem.layers) sum += layer.time;
    int exponent = 0;
    std::frexp(sum, &exponent);
    unit_exponent_ = exponent - 52;
    time_.push_back(0);
    weights_.push_back(0);
    kv_.push_back(0);
    for (const PartCost& layer : problem.layers) {
      time_.push_back(time_.back() + units(layer.time));
      weights_.push_back(weights_.back() + layer.weight_bytes);
      kv_.push_back(kv_.back() + layer.kv_bytes_per_token);
    }
    embedding_time_ = units(problem.embedding.time);
    head_time_ = units(problem.head.time);
    for (const StageDevice& device : problem.devices) time_factor_.push_back(1 / device.speed);
  }

  std::size_t n_layers() const { return problem_.layers.size(); }
  std::size_t n_stages() const { return problem_.devices.size(); }

  // In units of 2^unit_exponent.
  double time(std::size_t stage, std::size_t first, std::size_t end) const {
    const std::int64_t own = time_[end] - time_[first] + (stage == 0 ? embedding_time_ : 0) +
                             (stage + 1 == n_stages() ? head_time_ : 0);
    return static_cast<double>(own) * time_factor_[stage];
  }
  double in_callers_unit(double time) const { return std::ldexp(time, unit_exponent_); }

  std::int64_t weight_bytes(std::size_t stage, std::size_t first, std::size_t end) const {
    return weights_[end] - weights_[first] + (stage == 0 ? problem_.embedding.weight_bytes : 0) +
           (stage + 1 == n_stages() ? problem_.head.weight_bytes : 0);
  }
  std::int64_t min_kv_bytes(std::size_t first, std::size_t end) const {
    const std::int64_t per_token = kv_[end] - kv_[first];
    const std::int64_t n = problem_.min_kv_tokens;
    // Bounded, so that sums do not overflow: far more than any device has.
    return per_token != 0 && n > kUnlimited / 4 / per_token ? kUnlimited / 4 : n * per_token;
  }
  // The KV pool; kUnlimited when memory is not known; negative when weights alone do not fit.
  std::int64_t pool_bytes(std::size_t stage, std::size_t first, std::size_t end) const {
    const StageDevice& device = problem_.devices[stage];
    if (device.memory_bytes == 0) return device.kv_bytes > 0 ? device.kv_bytes : kUnlimited;
    const std::int64_t left =
        device.memory_bytes - device.workspace_bytes - weight_bytes(stage, first, end);
    if (device.kv_bytes == 0) return left;
    return left >= device.kv_bytes ? device.kv_bytes : kDoesNotFit;
  }
  // What the pool holds; kUnlimited without a bound, kDoesNotFit.
  std::int64_t pool_tokens(std::size_t stage, std::size_t first, std::size_t end) const {
    const std::int64_t pool = pool_bytes(stage, first, end);
    if (pool < 0) return kDoesNotFit;
    const std::int64_t per_token = kv_[end] - kv_[first];
    return pool == kUnlimited || per_token == 0 ? kUnlimited : pool / per_token;
  }
  // The same as far as it counts.
  std::int64_t useful_tokens(std::size_t stage, std::size_t first, std::size_t end) const {
    const std::int64_t most = problem_.max_kv_tokens == 0
                                  ? kUnlimited
                                  : std::max(problem_.max_kv_tokens, problem_.min_kv_tokens);
    return std::min(most, pool_tokens(stage, first, end));
  }
  // Bytes by which the stage falls short of one sequence; 0 when it does not.
  std::int64_t missing_bytes(std::size_t stage, std::size_t first, std::size_t end) const {
    const StageDevice& device = problem_.devices[stage];
    const std::int64_t sequence = min_kv_bytes(first, end);
    std::int64_t missing = 0;
    if (device.kv_bytes > 0) missing = std::max(missing, sequence - device.kv_bytes);
    if (device.memory_bytes > 0) {
      missing = std::max(missing, device.workspace_bytes + weight_bytes(stage, first, end) +
                                      std::max(sequence, device.kv_bytes) - device.memory_bytes);
    }
    return missing;
  }

 private:
  std::int64_t units(double time) const {
    return static_cast<std::int64_t>(std::llround(std::ldexp(time, -unit_exponent_)));
  }

  const PartitionProblem& problem_;
  int unit_exponent_ = 0;
  // Of the layers before the i-th.
  std::vector<std::int64_t> time_;
  std::vector<std::int64_t> weights_;
  std::vector<std::int64_t> kv_;
  std::int64_t embedding_time_ = 0;
  std::int64_t head_time_ = 0;
  std::vector<double> time_factor_;
};

// The first layer after each stage.
using Ends = std::vector<std::size_t>;

// The partition with the smallest largest cost(stage, first, end), where stage s may own the layers
// from `first` to at most last_end(s, first); of equals the one with the larger earlier stage, the
// rest again the best of what remains. Empty when there is none.
template <typename Value, typename Cost, typename LastEnd>
Ends least_largest(std::size_t n_layers, std::size_t n_stages, Cost cost, LastEnd last_end) {
  constexpr Value kNone = std::numeric_limits<Value>::max();
  std::vector<Value> after(n_layers + 1, kNone);  // of the stages behind, from each layer on
  after[n_layers] = std::numeric_limits<Value>::lowest();
  std::vector<Ends> choice(n_stages, Ends(n_layers + 1, 0));
  for (std::size_t stage = n_stages; stage-- > 0;) {
    std::vector<Value> best(n_layers + 1, kNone);
    const std::size_t n_behind = n_stages - stage - 1;
    const std::size_t last_first = stage == 0 ? 0 : n_layers - n_behind - 1;
    for (std::size_t first = stage; first <= last_first; ++first) {
      const std::size_t least_end = n_behind == 0 ? n_layers : first + 1;
      for (std::size_t end = std::min(n_layers - n_behind, last_end(stage, first));
           end >= least_end; --end) {
        if (after[end] >= best[first]) continue;
        const Value larger = std::max(cost(stage, first, end), after[end]);
        if (larger < best[first]) {
          best[first] = larger;
          choice[stage][first] = end;
        }
      }
    }
    after = std::move(best);
  }
  if (after[0] == kNone) return {};
  Ends ends;
  for (std::size_t stage = 0; stage < n_stages; ++stage) {
    ends.push_back(choice[stage][ends.empty() ? 0 : ends.back()]);
  }
  return ends;
}

// The fastest partition whose stages all hold n_tokens.
Ends fastest_with(const StageCosts& costs, std::int64_t n_tokens) {
  const std::size_t n_layers = costs.n_layers();
  // A range that fits still does without its first layer, so the ends only move up.
  std::vector<Ends> last_end(costs.n_stages(), Ends(n_layers));
  for (std::size_t stage = 0; stage < costs.n_stages(); ++stage) {
    std::size_t end = 0;
    for (std::size_t first = 0; first < n_layers; ++first) {
      end = std::max(end, first);
      while (end < n_layers && costs.useful_tokens(stage, first, end + 1) >= n_tokens) ++end;
      last_end[stage][first] = end;
    }
  }
  return least_largest<double>(
      n_layers, costs.n_stages(),
      [&](std::size_t stage, std::size_t first, std::size_t end) {
        return costs.time(stage, first, end);
      },
      [&](std::size_t stage, std::size_t first) { return last_end[stage][first]; });
}

struct Measured {
  double time = 0;
  std::int64_t tokens = kUnlimited;
};

Measured measure(const StageCosts& costs, const Ends& ends) {
  Measured measured;
  std::size_t first = 0;
  for (std::size_t stage = 0; stage < ends.size(); ++stage) {
    measured.time = std::max(measured.time, costs.time(stage, first, ends[stage]));
    measured.tokens = std::min(measured.tokens, costs.useful_tokens(stage, first, ends[stage]));
    first = ends[stage];
  }
  return measured;
}

std::string megabytes(std::int64_t bytes) {
  return std::to_string(bytes) + " bytes (" + std::to_string((bytes + 500000) / 1000000) + " MB)";
}

Status lacks_memory(const PartitionProblem& problem, const StageCosts& costs, const Ends& ends,
                    const std::string& which) {
  std::size_t worst = 0;
  std::int64_t missing = 0;
  std::size_t first_of_worst = 0;
  std::size_t first = 0;
  for (std::size_t stage = 0; stage < ends.size(); ++stage) {
    const std::int64_t own = costs.missing_bytes(stage, first, ends[stage]);
    if (own > missing) {
      missing = own;
      worst = stage;
      first_of_worst = first;
    }
    first = ends[stage];
  }
  if (missing == 0) return ok_status();
  const StageDevice& device = problem.devices[worst];
  const std::size_t end = ends[worst];
  std::string text = which + ": stage " + std::to_string(worst) + " with layers " +
                     std::to_string(first_of_worst) + "-" + std::to_string(end - 1) + " lacks " +
                     megabytes(missing) + ": KV of one sequence of " +
                     std::to_string(problem.min_kv_tokens) + " tokens takes " +
                     std::to_string(costs.min_kv_bytes(first_of_worst, end));
  if (device.kv_bytes > 0) text += ", the KV pool has " + std::to_string(device.kv_bytes);
  if (device.memory_bytes > 0) {
    text += ", weights take " + std::to_string(costs.weight_bytes(worst, first_of_worst, end)) +
            ", workspace " + std::to_string(device.workspace_bytes) + ", the device has " +
            std::to_string(device.memory_bytes);
  }
  return resource_exhausted(std::move(text));
}

LayerPartition predict(const StageCosts& costs, const Ends& ends) {
  LayerPartition partition;
  std::size_t first = 0;
  double sum = 0;
  for (std::size_t stage = 0; stage < ends.size(); ++stage) {
    const std::size_t end = ends[stage];
    StagePrediction own;
    own.layers = {static_cast<int>(first), static_cast<int>(end - first)};
    own.time = costs.in_callers_unit(costs.time(stage, first, end));
    own.weight_bytes = costs.weight_bytes(stage, first, end);
    if (const auto bytes = costs.pool_bytes(stage, first, end); bytes != kUnlimited) {
      own.kv_bytes = bytes;
      own.kv_tokens = costs.pool_tokens(stage, first, end);
    }
    sum += own.time;
    partition.stages.push_back(own);
    first = end;
  }
  for (std::size_t stage = 0; stage < ends.size(); ++stage) {
    StagePrediction& own = partition.stages[stage];
    own.time_share = own.time / sum;
    if (own.time > partition.stages[static_cast<std::size_t>(partition.slowest)].time) {
      partition.slowest = static_cast<int>(stage);
    }
    if (own.kv_tokens < 0) continue;
    const bool is_tighter =
        partition.tightest < 0 ||
        own.kv_tokens < partition.stages[static_cast<std::size_t>(partition.tightest)].kv_tokens;
    if (is_tighter) partition.tightest = static_cast<int>(stage);
  }
  return partition;
}

Ends choose(const PartitionProblem& problem, const StageCosts& costs) {
  struct Candidate {
    Ends ends;
    double worth = 0;
  };
  // In the order of tokens, each the fastest of those that hold as many.
  std::vector<Candidate> candidates;
  double best = 0;
  // Partitions at the very edge of the tolerance are within it, whatever rounding says.
  const auto is_near_best = [&](double worth) {
    return worth * (1 + problem.tolerance) >= best * (1 - 1e-12);
  };
  for (std::int64_t n_tokens = problem.min_kv_tokens;;) {
    Ends ends = fastest_with(costs, n_tokens);
    if (ends.empty()) break;
    const Measured measured = measure(costs, ends);
    const auto tokens = static_cast<double>(std::max<std::int64_t>(1, measured.tokens));
    const double worth = std::pow(tokens, problem.kv_weight) / measured.time;
    best = std::max(best, worth);
    // Without a weight, worth only falls from here on.
    if (problem.kv_weight == 0 && !is_near_best(worth)) break;
    candidates.push_back({std::move(ends), worth});
    if (measured.tokens == kUnlimited) break;
    n_tokens = measured.tokens + 1;
  }
  for (std::size_t i = candidates.size(); i-- > 0;) {
    if (is_near_best(candidates[i].worth)) return candidates[i].ends;
  }
  return {};
}

}  // namespace

Result<LayerPartition> partition_layers(const PartitionProblem& problem) {
  if (Status status = check_problem(problem); !status.ok()) return status;
  const StageCosts costs(problem);
  const Ends ends = choose(problem, costs);
  if (!ends.empty()) return predict(costs, ends);
  const Ends nearest = least_largest<std::int64_t>(
      costs.n_layers(), costs.n_stages(),
      [&](std::size_t stage, std::size_t first, std::size_t end) {
        return costs.missing_bytes(stage, first, end);
      },
      [&](std::size_t, std::size_t) { return costs.n_layers(); });
  Status status = lacks_memory(problem, costs, nearest,
                               "no split of " + std::to_string(costs.n_layers()) + " layers over " +
                                   std::to_string(costs.n_stages()) +
                                   " stages fits; in the one that comes nearest");
  CHECK(!status.ok(), "a split that lacks nothing was not found");
  return status;
}

Result<LayerPartition> partition_as_told(const PartitionProblem& problem,
                                         std::span<const int> layers_per_stage) {
  if (Status status = check_problem(problem); !status.ok()) return status;
  const std::size_t n_layers = problem.layers.size();
  Ends ends;
  std::size_t sum = 0;
  for (const int count : layers_per_stage) {
    if (count < 1 || static_cast<std::size_t>(count) > n_layers) {
      return invalid_argument("cluster.layers_per_stage: a stage of " + std::to_string(count) +
                              " layers");
    }
    sum += static_cast<std::size_t>(count);
    ends.push_back(sum);
  }
  if (ends.size() != problem.devices.size()) {
    return invalid_argument("cluster.layers_per_stage has " + std::to_string(ends.size()) +
                            " entries for " + std::to_string(problem.devices.size()) + " ranks");
  }
  if (sum != n_layers) {
    return invalid_argument("cluster.layers_per_stage sums to " + std::to_string(sum) +
                            ", the model has " + std::to_string(n_layers) + " layers");
  }
  const StageCosts costs(problem);
  if (Status status = lacks_memory(problem, costs, ends, "cluster.layers_per_stage");
      !status.ok()) {
    return status;
  }
  return predict(costs, ends);
}

}  // namespace spindle::coordinator
