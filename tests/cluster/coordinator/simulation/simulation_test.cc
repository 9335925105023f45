// Ten thousand clusters on a virtual clock, each from a seed, with what must hold checked after
// everything that happens. A seed that fails is run alone, with a line for everything that
// happens, by
//
//   SIM_SEED=123 build/tests/simulation_test --gtest_filter='*Replay*'

#include "cluster/coordinator/simulation/simulation.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>

#include "cluster/coordinator/simulation/scenario.h"

namespace spindle::coordinator::simulation {

// GoogleTest's name of the parameter.
void PrintTo(const FaultName& fault, std::ostream* out) { *out << fault.name; }

namespace {

constexpr int kSeeds = 10'000;
constexpr int kGroups = 20;

std::string replay(std::uint64_t seed) {
  return "SIM_SEED=" + std::to_string(seed) +
         " build/tests/simulation_test --gtest_filter='*Replay*'";
}

// A failed CHECK ends the process; this says in which seed.
char replay_on_abort[128];
void on_abort(int /*signal*/) {
  std::size_t n = 0;
  while (replay_on_abort[n] != '\0') ++n;
  (void)!write(STDERR_FILENO, replay_on_abort, n);
}

ScenarioResult run_seed(std::uint64_t seed, Fault fault = Fault::kNone,
                        std::ostream* trace = nullptr) {
  std::snprintf(replay_on_abort, sizeof replay_on_abort, "replay: %s\n", replay(seed).c_str());
  return Scenario(seed, fault, trace).run();
}

class Seeds : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { previous_ = std::signal(SIGABRT, on_abort); }
  void TearDown() override { std::signal(SIGABRT, previous_); }

 private:
  void (*previous_)(int) = nullptr;
};

TEST_P(Seeds, NothingThatMustHoldIsBroken) {
  const auto start = std::chrono::steady_clock::now();
  const int per_group = kSeeds / kGroups;
  ScenarioResult all;
  for (int i = 0; i < per_group; ++i) {
    const auto seed = static_cast<std::uint64_t>(GetParam() * per_group + i);
    const ScenarioResult result = run_seed(seed);
    ASSERT_EQ(result.violation, "") << "seed " << seed << "; replay: " << replay(seed);
    all.n_ok += result.n_ok;
    all.n_cancelled += result.n_cancelled;
    all.n_continued += result.n_continued;
    all.n_compressed += result.n_compressed;
    all.n_forked += result.n_forked;
    all.n_other += result.cluster_failed ? 1 : 0;
    all.n_preempted += result.n_preempted;
    all.n_expired += result.n_expired;
    all.n_budget_plans += result.n_budget_plans;
    all.n_steps += result.n_steps;
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf(
      "%d seeds, %.0f a second; %d requests ended well, %d cancelled, %d expired, %d "
      "preempted, %d continued a session, %d boundaries, %d budget plans, %d forks, %d "
      "clusters failed, %llu steps\n",
      per_group, per_group / seconds, all.n_ok, all.n_cancelled, all.n_expired, all.n_preempted,
      all.n_continued, all.n_compressed, all.n_budget_plans, all.n_forked, all.n_other,
      static_cast<unsigned long long>(all.n_steps));
  // Else little is tested.
  EXPECT_GT(all.n_ok, 4 * per_group);
  EXPECT_GT(all.n_cancelled, per_group / 2);
  EXPECT_GT(all.n_continued, per_group / 5);
  EXPECT_GT(all.n_compressed, per_group / 5);
  EXPECT_GT(all.n_forked, per_group / 2);
  EXPECT_GT(all.n_preempted, per_group / 10);
  EXPECT_GT(all.n_expired, per_group / 5);
  EXPECT_GT(all.n_budget_plans, per_group / 10);
  EXPECT_GT(all.n_other, per_group / 50);
}

INSTANTIATE_TEST_SUITE_P(TenThousand, Seeds, ::testing::Range(0, kGroups));

// SIM_SEED says which; without it, seed 0 and no output.
TEST(Simulation, Replay) {
  const char* asked = std::getenv("SIM_SEED");
  std::ostringstream unseen;
  std::ostream& trace = asked != nullptr ? std::cout : unseen;
  const std::uint64_t seed = asked != nullptr ? std::strtoull(asked, nullptr, 10) : 0;
  EXPECT_EQ(run_seed(seed, Fault::kNone, &trace).violation, "");
}

TEST(Simulation, SeedsRepeat) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::ostringstream first;
    std::ostringstream second;
    run_seed(seed, Fault::kNone, &first);
    run_seed(seed, Fault::kNone, &second);
    ASSERT_EQ(first.str(), second.str());
    ASSERT_GT(first.str().size(), 1000u);
  }
}

// In what share of the runs that a fault strikes it must be found. Some strikes do no harm: to a
// request that is cancelled before it matters, to a sequence that was only kept as a session, or on
// a stage where the ledger still promises more than is held, since reports are on their way.
double least_found(Fault fault) {
  switch (fault) {
    case Fault::kLowReport:
      return 0.5;
    case Fault::kLostFree:
    case Fault::kLostScores:
      return 0.7;
    case Fault::kLargeReservation:
      return 0.75;
    case Fault::kLeakedPage:
    case Fault::kResultTwice:
    case Fault::kPlansSwapped:
    case Fault::kRepeatedEnd:
      return 1.0;
    default:
      return 0.85;
  }
}

class Faults : public ::testing::TestWithParam<FaultName> {};

TEST_P(Faults, AreFound) {
  const Fault fault = GetParam().fault;
  int n_struck = 0;
  int n_found = 0;
  for (std::uint64_t seed = 0; seed < 1500 && n_struck < 50; ++seed) {
    const ScenarioResult result = run_seed(seed, fault);
    if (!result.fault_struck) {
      ASSERT_EQ(result.violation, "") << "seed " << seed;
      continue;
    }
    ++n_struck;
    n_found += result.violation.empty() ? 0 : 1;
  }
  std::printf("%d strikes, %d found\n", n_struck, n_found);
  EXPECT_GE(n_struck, 50);
  EXPECT_GE(n_found, least_found(fault) * n_struck);
}

INSTANTIATE_TEST_SUITE_P(All, Faults, ::testing::ValuesIn(kFaults), [](const auto& param_info) {
  std::string name(param_info.param.name);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

}  // namespace
}  // namespace spindle::coordinator::simulation
