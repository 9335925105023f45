#pragma once
// A whole cluster in one process for tests: n stages on threads over the in-process groups, and the
// real engine on rank 0.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cluster/comm/local_group.h"
#include "cluster/engine/engine.h"
#include "worker/daemon/rank_runtime.h"
#include "worker/engine/pipeline_engine.h"

namespace spindle::worker {

// What one request produced. Tokens exclude a stop token; `ends_with` is per choice.
struct Generated {
  std::vector<std::vector<std::int32_t>> tokens;        // [choice][...]
  std::vector<std::vector<engine::TokenEvent>> events;  // [choice][...]
  std::vector<engine::FinishReason> ends_with;          // [choice]
  Status status;
  engine::RequestSummary summary;
};

// Collects a request's events; wait() blocks until on_end or a minute has passed.
class CollectingSink final : public engine::EventSink {
 public:
  explicit CollectingSink(int n_choices);
  void on_tokens(std::span<const engine::TokenEvent> events) override;
  void on_end(const Status& status, const engine::RequestSummary& summary) override;

  void on_prompt_scores(std::span<const engine::PromptScore> scores) override;
  std::vector<engine::PromptScore> scores() const;

  Generated wait();
  // Waits until at least n tokens of any choice came.
  bool wait_tokens(std::size_t n);
  int n_ends() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Generated generated_;
  std::vector<engine::PromptScore> scores_;
  std::size_t n_tokens_ = 0;
  int n_ends_ = 0;
};

struct LocalClusterSettings {
  int n_stages = 1;
  RankSettings rank;  // model_dir is filled in when empty
  int max_num_seqs = 64;
  int max_num_queued_reqs = 256;
  int micro_batches = 0;  // 0: the default
  std::uint64_t seed = 1234;
  std::shared_ptr<const kvstore::ProfileTable> profile_table = {};
  std::int64_t session_ttl_us = 600'000'000;
  // The next step begins while tokens are awaited, as on a GPU (EarlyStage).
  bool begins_early = false;
  // With that: but not when it had to wait for the stage before, as where ranks share a GPU.
  bool recv_waits = false;
  bool balances = false;  // KV budgets, at once and without rest, for balanced_policy()
};

// A default policy whose sizes the balancer decides: 30 % by SnapKV.
kvstore::KvPolicy balanced_policy();

class TestCluster {
 public:
  explicit TestCluster(LocalClusterSettings settings);
  ~TestCluster();

  PipelineEngine& engine() { return *engine_; }
  // Steps that began while the tokens of the one before were awaited.
  int n_early() const { return n_early_; }
  const RankRuntime& rank(int stage) const { return *ranks_.at(static_cast<std::size_t>(stage)); }
  std::shared_ptr<CollectingSink> submit(engine::EngineRequest request,
                                         engine::RequestHandle* handle = nullptr);
  Generated generate(engine::EngineRequest request) { return submit(std::move(request))->wait(); }
  // After it, the stages have stopped and their stores can be looked at.
  void stop();

 private:
  comm::LocalCluster groups_;
  std::atomic<int> n_early_{0};
  std::vector<std::unique_ptr<RankRuntime>> ranks_;
  std::unique_ptr<PipelineEngine> engine_;
  std::vector<std::thread> threads_;
};

// A greedy request that ignores nothing: ends at the model's end-of-sequence tokens.
engine::EngineRequest greedy_request(std::vector<std::int32_t> prompt, int max_tokens);

struct GoldenGreedy {
  std::string name;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> output;  // without the end-of-sequence token, if it ends with one
  bool ends_with_eos = false;
};
// The reference continuations of tests/golden/golden.json with prompts of at most max_prompt.
std::vector<GoldenGreedy> load_golden_greedy(std::size_t max_prompt);

std::string mini_model_dir();

}  // namespace spindle::worker
