#include "cluster/coordinator/layer_partition.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <tuple>

namespace spindle::coordinator {
namespace {

using testing::HasSubstr;
using Counts = std::vector<int>;

PartitionProblem equal_layers(int n_layers, int n_stages, double head_time = 0,
                              double embedding_time = 0) {
  PartitionProblem problem;
  problem.layers.assign(static_cast<std::size_t>(n_layers), {.time = 1.0});
  problem.head.time = head_time;
  problem.embedding.time = embedding_time;
  problem.devices.resize(static_cast<std::size_t>(n_stages));
  return problem;
}

Counts counts_of(const LayerPartition& partition) {
  Counts counts;
  for (const StagePrediction& stage : partition.stages) counts.push_back(stage.layers.count);
  return counts;
}

Counts split(const PartitionProblem& problem) {
  const auto partition = partition_layers(problem);
  EXPECT_TRUE(partition.ok()) << partition.status().to_string();
  return partition.ok() ? counts_of(*partition) : Counts{};
}

TEST(PartitionLayers, EqualLayersAreSplitEvenlyWithTheRestInFront) {
  EXPECT_EQ(split(equal_layers(12, 1)), (Counts{12}));
  EXPECT_EQ(split(equal_layers(12, 2)), (Counts{6, 6}));
  EXPECT_EQ(split(equal_layers(12, 12)), Counts(12, 1));
  EXPECT_EQ(split(equal_layers(7, 3)), (Counts{3, 2, 2}));
}

TEST(PartitionLayers, TheEndsCostTheirStagesLayers) {
  // 6 + 6 would cost 7.33 at most, 7 + 5 costs 7.
  EXPECT_EQ(split(equal_layers(12, 2, 1.33)), (Counts{7, 5}));
  EXPECT_EQ(split(equal_layers(4, 2, 0, 10)), (Counts{1, 3}));
}

TEST(PartitionLayers, LayersMayDiffer) {
  PartitionProblem problem = equal_layers(6, 2);
  problem.layers[0].time = 5;
  EXPECT_EQ(split(problem), (Counts{1, 5}));
  problem.layers[0].time = 1;
  problem.layers[5].time = 5;
  EXPECT_EQ(split(problem), (Counts{5, 1}));
}

TEST(PartitionLayers, AFastDeviceGetsMore) {
  PartitionProblem problem = equal_layers(12, 2);
  problem.devices[1].speed = 2;
  EXPECT_EQ(split(problem), (Counts{4, 8}));
  problem.devices[1].speed = 0.5;
  EXPECT_EQ(split(problem), (Counts{8, 4}));
}

TEST(PartitionLayers, FractionsThatAreEqualAreEqual) {
  // Sums of 0.1 in floating point depend on where they begin.
  PartitionProblem problem = equal_layers(30, 3);
  for (PartCost& layer : problem.layers) layer.time = 0.1;
  EXPECT_EQ(split(problem), (Counts{10, 10, 10}));
  problem.layers.pop_back();
  EXPECT_EQ(split(problem), (Counts{10, 10, 9}));
}

// 100 bytes of weights and 1 byte of KV per token and layer.
PartitionProblem with_memory(int n_layers, std::vector<std::int64_t> memory) {
  PartitionProblem problem = equal_layers(n_layers, static_cast<int>(memory.size()));
  for (PartCost& layer : problem.layers) {
    layer.weight_bytes = 100;
    layer.kv_bytes_per_token = 1;
  }
  for (std::size_t i = 0; i < memory.size(); ++i) problem.devices[i].memory_bytes = memory[i];
  problem.min_kv_tokens = 10;
  return problem;
}

TEST(PartitionLayers, PredictsTimeAndKv) {
  PartitionProblem problem = with_memory(12, {2000, 1300});
  problem.head = {.time = 2, .weight_bytes = 50};
  problem.devices[1].speed = 2;
  problem.devices[0].workspace_bytes = 200;
  const auto partition = partition_as_told(problem, Counts{6, 6});
  ASSERT_TRUE(partition.ok()) << partition.status().to_string();
  const StagePrediction& first = partition->stages[0];
  const StagePrediction& last = partition->stages[1];
  EXPECT_EQ(first.layers, (LayerRange{0, 6}));
  EXPECT_EQ(last.layers, (LayerRange{6, 6}));
  EXPECT_DOUBLE_EQ(first.time, 6);
  EXPECT_DOUBLE_EQ(last.time, 4);
  EXPECT_DOUBLE_EQ(first.time_share, 0.6);
  EXPECT_EQ(first.weight_bytes, 600);
  EXPECT_EQ(last.weight_bytes, 650);
  EXPECT_EQ(first.kv_bytes, 1200);
  EXPECT_EQ(first.kv_tokens, 200);
  EXPECT_EQ(last.kv_bytes, 650);
  EXPECT_EQ(last.kv_tokens, 108);
  EXPECT_EQ(partition->slowest, 0);
  EXPECT_EQ(partition->tightest, 1);
}

TEST(PartitionLayers, MemoryThatIsNotKnownIsNotPredicted) {
  const auto partition = partition_layers(equal_layers(4, 2));
  ASSERT_TRUE(partition.ok());
  EXPECT_EQ(partition->tightest, -1);
  EXPECT_EQ(partition->stages[0].kv_tokens, -1);
}

TEST(PartitionLayers, ALayerMovesToMemoryWhereTimeIsWithinTheTolerance) {
  // 20 + 20 leaves the smaller device 2000 bytes, 100 tokens a layer; 21 + 19 is 5 % slower.
  PartitionProblem problem = with_memory(40, {9000, 4000});
  EXPECT_EQ(split(problem), (Counts{21, 19}));
  problem.tolerance = 0;
  EXPECT_EQ(split(problem), (Counts{20, 20}));
  // The other way round.
  problem = with_memory(40, {4000, 9000});
  EXPECT_EQ(split(problem), (Counts{19, 21}));
}

TEST(PartitionLayers, MemoryForcesASplitThatIsSlower) {
  // 12 layers and 10 tokens take 1320: at most 9 fit into 1000.
  EXPECT_EQ(split(with_memory(24, {9000, 1000})), (Counts{15, 9}));
}

TEST(PartitionLayers, StatedMemoryIsBalancedWhereThatBuysMoreThanItCosts) {
  PartitionProblem problem = with_memory(24, {8000, 2400});
  EXPECT_EQ(split(problem), (Counts{12, 12}));
  problem.kv_weight = kStatedMemoryKvWeight;
  // 12 + 12 holds 100 tokens; 19 + 5 holds 321 (the first stage 321, the last 380) and takes 19/12
  // times as long.
  const auto partition = partition_layers(problem);
  ASSERT_TRUE(partition.ok());
  EXPECT_EQ(counts_of(*partition), (Counts{19, 5}));
  EXPECT_EQ(partition->stages[0].kv_tokens, 321);
  EXPECT_EQ(partition->stages[1].kv_tokens, 380);
  EXPECT_EQ(partition->tightest, 0);
  EXPECT_EQ(partition->slowest, 0);
  // More than 100 tokens cannot be used: nothing is bought, so time alone counts.
  problem.max_kv_tokens = 100;
  EXPECT_EQ(split(problem), (Counts{12, 12}));
}

TEST(PartitionLayers, PoolsOfOneSizeBalanceTheirLayersPoolsOfOtherSizesTheirTokens) {
  PartitionProblem problem = with_memory(12, {0, 0});
  problem.kv_weight = kStatedMemoryKvWeight;
  for (StageDevice& device : problem.devices) device.kv_bytes = 600;
  EXPECT_EQ(split(problem), (Counts{6, 6}));
  problem.devices[0].kv_bytes = 1200;
  EXPECT_EQ(split(problem), (Counts{8, 4}));
  problem.devices[0].kv_bytes = 1800;
  EXPECT_EQ(split(problem), (Counts{9, 3}));
}

TEST(PartitionLayers, NamesTheStageThatLacksMemoryAndHowMuch) {
  const Status status = partition_layers(with_memory(24, {1320, 1000})).status();
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  // 12 + 12: 1320 fits, 1000 lacks 320. 13 + 11: 110 and 210. 14 + 10: 220 and 100.
  EXPECT_THAT(status.message(), HasSubstr("stage 1 with layers 13-23 lacks 210 bytes"));
  EXPECT_THAT(status.message(), HasSubstr("the device has 1000"));
  PartitionProblem pool = with_memory(4, {0, 0});
  pool.devices[0].kv_bytes = 30;
  pool.devices[1].kv_bytes = 5;
  EXPECT_THAT(partition_layers(pool).status().message(),
              HasSubstr("stage 1 with layers 3-3 lacks 5 bytes"));
}

TEST(PartitionLayers, APoolThatDoesNotFitBesideTheWeightsIsRefused) {
  PartitionProblem problem = with_memory(4, {500, 500});
  problem.devices[1].kv_bytes = 200;
  EXPECT_EQ(split(problem), (Counts{2, 2}));
  problem.devices[1].kv_bytes = 450;
  EXPECT_THAT(partition_layers(problem).status().message(), HasSubstr("the KV pool has 450"));
}

TEST(PartitionLayers, RefusesWhatMakesNoSense) {
  const auto refused = [](const PartitionProblem& problem) {
    return partition_layers(problem).status().code() == StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused(equal_layers(3, 4)));
  EXPECT_TRUE(refused(equal_layers(3, 0)));
  EXPECT_TRUE(refused(equal_layers(5000, 4)));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double time : {-1.0, nan, std::numeric_limits<double>::infinity(), 1e300}) {
    PartitionProblem problem = equal_layers(3, 2);
    problem.layers[1].time = time;
    EXPECT_TRUE(refused(problem)) << time;
  }
  for (const double speed : {0.0, -1.0, nan, 1e-300}) {
    PartitionProblem problem = equal_layers(3, 2);
    problem.devices[1].speed = speed;
    EXPECT_TRUE(refused(problem)) << speed;
  }
  PartitionProblem problem = equal_layers(3, 2);
  for (PartCost& layer : problem.layers) layer.time = 0;
  EXPECT_TRUE(refused(problem));
  // The largest sizes that are allowed overflow nothing.
  problem = with_memory(4096, {1LL << 50, 1LL << 50});
  for (PartCost& layer : problem.layers) {
    layer.weight_bytes = 1LL << 50;
    layer.kv_bytes_per_token = 1LL << 50;
  }
  problem.min_kv_tokens = 1LL << 50;
  EXPECT_THAT(partition_layers(problem).status().message(), HasSubstr("lacks"));
}

// All partitions of a small problem, judged by the rule as the header words it.
struct Judged {
  Counts counts;
  double time = 0;
  double tokens = 0;
  double worth = 0;
};

double stage_time(const PartitionProblem& p, std::size_t stage, int first, int count) {
  double time = stage == 0 ? p.embedding.time : 0;
  for (int i = first; i < first + count; ++i) time += p.layers[static_cast<std::size_t>(i)].time;
  if (stage + 1 == p.devices.size()) time += p.head.time;
  return time / p.devices[stage].speed;
}

// -1 when the stage does not fit.
double stage_tokens(const PartitionProblem& p, std::size_t stage, int first, int count) {
  const StageDevice& device = p.devices[stage];
  std::int64_t weights = stage == 0 ? p.embedding.weight_bytes : 0;
  if (stage + 1 == p.devices.size()) weights += p.head.weight_bytes;
  std::int64_t per_token = 0;
  for (int i = first; i < first + count; ++i) {
    weights += p.layers[static_cast<std::size_t>(i)].weight_bytes;
    per_token += p.layers[static_cast<std::size_t>(i)].kv_bytes_per_token;
  }
  const double most = p.max_kv_tokens > 0 ? static_cast<double>(p.max_kv_tokens) : 1e30;
  double tokens = most;
  const std::int64_t left = device.memory_bytes - device.workspace_bytes - weights;
  if (device.memory_bytes > 0 && left < device.kv_bytes) return -1;
  if (device.kv_bytes > 0) {
    tokens = static_cast<double>(device.kv_bytes / per_token);
  } else if (device.memory_bytes > 0) {
    tokens = static_cast<double>(left / per_token);
  }
  return tokens < static_cast<double>(p.min_kv_tokens) ? -1 : std::min(tokens, most);
}

void all_partitions(const PartitionProblem& p, int first, Counts& counts,
                    std::vector<Judged>& out) {
  const std::size_t stage = counts.size();
  const int n_layers = static_cast<int>(p.layers.size());
  const int behind = static_cast<int>(p.devices.size() - stage) - 1;
  if (behind < 0) {
    Judged judged{counts, 0, 1e30, 0};
    int at = 0;
    for (std::size_t s = 0; s < counts.size(); ++s) {
      judged.time = std::max(judged.time, stage_time(p, s, at, counts[s]));
      const double tokens = stage_tokens(p, s, at, counts[s]);
      if (tokens < 0) return;
      judged.tokens = std::min(judged.tokens, tokens);
      at += counts[s];
    }
    judged.worth = std::pow(std::max(1.0, judged.tokens), p.kv_weight) / judged.time;
    out.push_back(judged);
    return;
  }
  for (int count = behind == 0 ? n_layers - first : 1; count <= n_layers - first - behind;
       ++count) {
    counts.push_back(count);
    all_partitions(p, first + count, counts, out);
    counts.pop_back();
  }
}

// For the last tie: time of the stages from each one on, then the larger count.
std::vector<double> tie_key(const PartitionProblem& p, const Counts& counts) {
  std::vector<double> key;
  for (std::size_t s = 0; s < counts.size(); ++s) {
    double slowest = 0;
    int at = 0;
    for (std::size_t t = 0; t < counts.size(); ++t) {
      if (t >= s) slowest = std::max(slowest, stage_time(p, t, at, counts[t]));
      at += counts[t];
    }
    key.push_back(slowest);
    key.push_back(-counts[s]);
  }
  return key;
}

Counts best_of_all(const PartitionProblem& p) {
  std::vector<Judged> all;
  Counts counts;
  all_partitions(p, 0, counts, all);
  double best = 0;
  for (const Judged& one : all) best = std::max(best, one.worth);
  const Judged* chosen = nullptr;
  for (const Judged& one : all) {
    if (one.worth * (1 + p.tolerance) < best * (1 - 1e-12)) continue;
    const auto order = [&](const Judged& j) {
      return std::tuple(-j.tokens, j.time, tie_key(p, j.counts));
    };
    if (chosen == nullptr || order(one) < order(*chosen)) chosen = &one;
  }
  return chosen == nullptr ? Counts{} : chosen->counts;
}

TEST(PartitionLayers, IsWhatTheRuleSaysOfAllPartitions) {
  int n_feasible = 0;
  int n_moved_by_memory = 0;
  for (std::uint32_t seed = 1; seed <= 3000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    PartitionProblem p;
    const bool equal = below(2) == 0;
    const int n_layers = 1 + below(10);
    for (int i = 0; i < n_layers; ++i) {
      p.layers.push_back({1.0 + below(4), 50 + below(100), 1 + below(3)});
      if (equal) p.layers.back() = p.layers.front();
    }
    p.embedding = {static_cast<double>(below(3)), below(200), 0};
    p.head = {static_cast<double>(below(5)), below(200), 0};
    p.devices.resize(static_cast<std::size_t>(1 + below(std::min(4, n_layers))));
    const int known = below(4);  // 0: none, 1: pools, 2: memory, 3: either or both
    for (StageDevice& device : p.devices) {
      if (below(3) == 0) device.speed = std::ldexp(1.0, below(3) - 1);
      if (known == 1 || (known == 3 && below(2) == 0)) device.kv_bytes = 50 + below(2000);
      if (known == 2 || (known == 3 && below(2) == 0)) device.memory_bytes = 500 + below(4000);
      device.workspace_bytes = below(100);
    }
    p.min_kv_tokens = 1 + below(60);
    if (below(3) == 0) p.max_kv_tokens = p.min_kv_tokens + below(300);
    const double tolerances[] = {0.0, 0.05, 0.3};
    p.tolerance = tolerances[below(3)];
    const double weights[] = {0.0, 0.5, 1.0};
    p.kv_weight = weights[below(3)];

    const Counts expected = best_of_all(p);
    const auto partition = partition_layers(p);
    if (expected.empty()) {
      EXPECT_THAT(partition.status().message(), HasSubstr("lacks"));
      continue;
    }
    ++n_feasible;
    ASSERT_TRUE(partition.ok()) << partition.status().to_string();
    EXPECT_EQ(counts_of(*partition), expected);
    PartitionProblem blind = p;
    for (StageDevice& device : blind.devices) device = {.speed = device.speed};
    n_moved_by_memory += split(blind) != expected ? 1 : 0;
  }
  // The cases are of all kinds.
  EXPECT_GT(n_feasible, 1500);
  EXPECT_LT(n_feasible, 2900);
  EXPECT_GT(n_moved_by_memory, 200);
}

TEST(PartitionLayers, ManyLayersAndStagesAreQuick) {
  double worst_ms = 0;
  for (std::uint32_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    for (const std::size_t n_stages : {8U, 43U, 64U}) {
      PartitionProblem p = with_memory(128, std::vector<std::int64_t>(n_stages));
      p.kv_weight = kStatedMemoryKvWeight;
      for (PartCost& layer : p.layers) layer.time = 1 + static_cast<double>(random() % 1000) / 1000;
      for (StageDevice& device : p.devices) {
        device.memory_bytes = 10000 + static_cast<std::int64_t>(random() % 30000);
        device.speed = 1 + static_cast<double>(random() % 1000) / 500;
      }
      const auto begin = std::chrono::steady_clock::now();
      EXPECT_TRUE(partition_layers(p).ok());
      const std::chrono::duration<double, std::milli> took =
          std::chrono::steady_clock::now() - begin;
      worst_ms = std::max(worst_ms, took.count());
    }
  }
  RecordProperty("worst_ms", std::to_string(worst_ms));
  EXPECT_LT(worst_ms, 5000);  // of a loaded machine with sanitizers
}

TEST(PartitionAsTold, ChecksWhatItIsTold) {
  const PartitionProblem problem = equal_layers(12, 2);
  EXPECT_EQ(counts_of(*partition_as_told(problem, Counts{5, 7})), (Counts{5, 7}));
  EXPECT_FALSE(partition_as_told(problem, Counts{5, 6}).ok());
  EXPECT_FALSE(partition_as_told(problem, Counts{12}).ok());
  EXPECT_FALSE(partition_as_told(problem, Counts{12, 0}).ok());
  EXPECT_FALSE(partition_as_told(problem, Counts{13, -1}).ok());
}

TEST(PartitionAsTold, AStageThatLacksMemoryIsNamed) {
  EXPECT_THAT(partition_as_told(with_memory(24, {9000, 1000}), Counts{14, 10}).status().message(),
              HasSubstr("cluster.layers_per_stage: stage 1 with layers 14-23 lacks 100 bytes"));
}

}  // namespace
}  // namespace spindle::coordinator
