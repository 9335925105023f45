#pragma once
// A small cluster and everything that happens to it, drawn from one seed: 1 to 5 uneven stages,
// fast or slow links, bursts and trickles of requests of all kinds, clients that cancel or stop a
// choice, sessions, policies with boundaries, drains, stages that stop or fail. Small enough that
// ten thousand of them are run as a test.
//
// Thread-safety: none; a Scenario owns its whole world.

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "cluster/coordinator/simulation/simulation.h"

namespace spindle::coordinator::simulation {

// What a run came to; the counts show that it tested something.
struct ScenarioResult {
  std::string violation;  // empty: none
  bool fault_struck = false;
  bool cluster_failed = false;
  int n_ok = 0;
  int n_cancelled = 0;
  int n_refused = 0;
  int n_other = 0;       // ended with another status
  int n_continued = 0;   // from a session
  int n_compressed = 0;  // boundaries that compressed something
  int n_forked = 0;      // further choices of requests that ended well
  int n_preempted = 0;   // requests that gave their KV back and ran again
  int n_expired = 0;
  int n_budget_plans = 0;
  std::uint64_t n_steps = 0;
};

class Scenario {
 public:
  // With a fault no stage is stopped or told to fail, so that only the fault can be found.
  explicit Scenario(std::uint64_t seed, Fault fault = Fault::kNone, std::ostream* trace = nullptr);

  ScenarioResult run();
  const Simulation& simulation() const { return *simulation_; }

 private:
  // Which kinds of things happen in this run.
  struct Habits {
    bool has_policies = false;
    // Of most requests, when there is a balancer.
    std::optional<kvstore::KvProfile> balanced_profile = std::nullopt;
    bool has_sessions = false;
    bool bursts = false;
    int n_priorities = 1;
    int n_owners = 1;
    int timeout_one_in = 0;
    int n_requests = 0;
    std::int64_t gap_us = 0;
    int cancel_one_in = 0;
    int finish_one_in = 0;
    std::int64_t patience_us = 0;  // until a client cancels, at most
    int max_prompt = 0;
    int max_output = 0;
  };

  SimulationConfig random_config();
  LatencyModel random_latency();
  void add_balance(SimulationConfig& config);
  void schedule_arrivals();
  void schedule_disruptions();
  void arrive();
  engine::EngineRequest random_request();
  void add_policy(engine::EngineRequest& request);
  kvstore::HeadOverride random_override();
  void add_session(engine::EngineRequest& request);
  void add_scores(engine::EngineRequest& request);
  void on_end(const Life& life);

  std::uint64_t seed_;
  Fault fault_;
  std::ostream* trace_;
  SeededRandom random_;
  Habits habits_;
  std::int32_t vocab_size_ = 0;
  int max_num_seqs_ = 0;
  int n_layers_ = 0;
  std::size_t n_stages_ = 0;
  std::unique_ptr<Simulation> simulation_;
  std::array<std::vector<std::int32_t>, 3> histories_;  // tokens of each session
  ScenarioResult result_;
};

}  // namespace spindle::coordinator::simulation
