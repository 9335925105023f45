#pragma once
// A budget balancer with stages that report what a test says.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cluster/coordinator/budget_balancer.h"

namespace spindle::coordinator::testing {

inline constexpr std::int64_t kSecond = 1'000'000;
inline constexpr std::int64_t kTypical = 1000;

// n levels, each `step` of the one before, from `bytes` at level 0 on.
inline kvstore::LevelCurve geometric_curve(double bytes, double step, int n_levels,
                                           double error = 1.0) {
  kvstore::LevelCurve curve;
  for (int l = 0; l < n_levels; ++l) {
    const double share = std::pow(step, l);
    curve.push_back({static_cast<std::uint64_t>(bytes * share), error * (1 / share - 1)});
  }
  return curve;
}

// Stages whose request takes 1,000 bytes uncompressed and 100 at the policy's own level.
inline BalancerConfig config_of(int n_stages, int own_level = 0) {
  BalancerConfig config;
  for (int s = 0; s < n_stages; ++s) {
    config.curves.push_back(geometric_curve(100 / std::pow(0.75, own_level), 0.75, 6 + own_level));
    config.token_bytes.push_back(1);
  }
  config.own_level = own_level;
  config.typical_tokens = kTypical;
  config.max_num_seqs = 1000;
  config.unfilled_prompts = 0;
  return config;
}

inline BudgetBalancer make(const BalancerConfig& config) {
  auto balancer = BudgetBalancer::make(config);
  EXPECT_TRUE(balancer.ok()) << balancer.status().to_string();
  return std::move(*balancer);
}

// Stages with so much memory, asked once a second.
struct Bench {
  Bench(const BalancerConfig& config, std::vector<std::uint64_t> capacity)
      : balancer(make(config)), reports(capacity.size()), ledger(capacity.size()) {
    for (std::size_t s = 0; s < capacity.size(); ++s) {
      reports[s] = {.stage = static_cast<std::uint32_t>(s),
                    .n_stages = static_cast<std::uint32_t>(capacity.size()),
                    .capacity_bytes = capacity[s]};
      ledger[s] = {.committed_bytes = 0, .capacity_bytes = capacity[s]};
    }
  }

  // One decision a second; every stage carries out what was decided at once.
  std::optional<BudgetDecision> tick(int n_requests, double mean_tokens = kTypical) {
    now_us += kSecond;
    for (BudgetReport& report : reports) report.step = step;
    step += 50;
    auto decided = balancer.decide({.now_us = now_us,
                                    .next_step = step,
                                    .reports = reports,
                                    .ledger = ledger,
                                    .n_running = n_requests / 2,
                                    .n_prefilling = std::min(n_prefilling, n_requests / 2),
                                    .n_waiting = n_requests - n_requests / 2,
                                    .mean_tokens = n_requests > 0 ? mean_tokens : 0});
    EXPECT_TRUE(decided.ok()) << decided.status().to_string();
    if (!decided.ok() || !*decided) return std::nullopt;
    ++n_moves;
    for (BudgetReport& report : reports) report.epoch = balancer.epoch();
    return **decided;
  }
  int run(int n_ticks, int n_requests) {
    const int before = n_moves;
    for (int i = 0; i < n_ticks; ++i) tick(n_requests);
    return n_moves - before;
  }

  BudgetBalancer balancer;
  std::vector<BudgetReport> reports;
  std::vector<LedgerUse> ledger;
  std::int64_t now_us = 0;
  std::uint64_t step = 0;
  int n_prefilling = 0;
  int n_moves = 0;
};

}  // namespace spindle::coordinator::testing
