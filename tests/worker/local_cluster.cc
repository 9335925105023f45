#include "tests/worker/local_cluster.h"

#include <gtest/gtest.h>

#include <boost/json.hpp>
#include <fstream>
#include <sstream>
#include <utility>

#include "cluster/coordinator/kv_balance.h"
#include "tests/source_dir.h"
#include "tests/worker/early_stage.h"
#include "worker/daemon/cluster_start.h"

namespace spindle::worker {

CollectingSink::CollectingSink(int n_choices) {
  generated_.tokens.resize(static_cast<std::size_t>(n_choices));
  generated_.events.resize(static_cast<std::size_t>(n_choices));
  generated_.ends_with.resize(static_cast<std::size_t>(n_choices), engine::FinishReason::kNone);
}

void CollectingSink::on_tokens(std::span<const engine::TokenEvent> events) {
  const std::lock_guard lock(mutex_);
  for (const engine::TokenEvent& event : events) {
    const auto choice = static_cast<std::size_t>(event.choice);
    if (!event.is_stop_token) generated_.tokens.at(choice).push_back(event.token);
    generated_.events.at(choice).push_back(event);
    if (event.finish != engine::FinishReason::kNone) generated_.ends_with[choice] = event.finish;
    ++n_tokens_;
  }
  changed_.notify_all();
}

void CollectingSink::on_end(const Status& status, const engine::RequestSummary& summary) {
  const std::lock_guard lock(mutex_);
  generated_.status = status;
  generated_.summary = summary;
  ++n_ends_;
  changed_.notify_all();
}

void CollectingSink::on_prompt_scores(std::span<const engine::PromptScore> scores) {
  const std::lock_guard lock(mutex_);
  scores_.insert(scores_.end(), scores.begin(), scores.end());
}

std::vector<engine::PromptScore> CollectingSink::scores() const {
  const std::lock_guard lock(mutex_);
  return scores_;
}

Generated CollectingSink::wait() {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, std::chrono::minutes(3), [this] { return n_ends_ > 0; })) {
    ADD_FAILURE() << "the request did not end within three minutes";
    generated_.status = deadline_exceeded("test");
  }
  return generated_;
}

bool CollectingSink::wait_tokens(std::size_t n) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::minutes(3), [&] {
    return n_tokens_ >= n || n_ends_ > 0;
  }) && n_tokens_ >= n;
}

int CollectingSink::n_ends() const {
  const std::lock_guard lock(mutex_);
  return n_ends_;
}

kvstore::KvPolicy balanced_policy() {
  kvstore::KvPolicy policy;
  policy.profile = kvstore::KvProfile::kSnapKv;
  policy.ratio = 0.3;
  policy.best_effort = true;
  policy.recent = 32;
  return policy;
}

TestCluster::TestCluster(LocalClusterSettings settings)
    : groups_(settings.n_stages, {.recv_waits = settings.recv_waits || !settings.begins_early}) {
  if (settings.rank.model_dir.empty()) settings.rank.model_dir = mini_model_dir();
  settings.rank.max_num_seqs = settings.max_num_seqs;
  settings.rank.worker.check_invariants = true;
  if (settings.begins_early) {
    settings.rank.wrap_stage = [this](std::unique_ptr<Stage> stage) {
      return std::make_unique<EarlyStage>(std::move(stage), n_early_);
    };
  }
  std::vector<control::StageInfo> stages;
  // At once: ranks on GPUs meet while they start.
  std::vector<Result<std::unique_ptr<RankRuntime>>> created;
  for (int stage = 0; stage < settings.n_stages; ++stage) created.push_back(unavailable("not yet"));
  std::vector<std::thread> starting;
  for (int stage = 0; stage < settings.n_stages; ++stage) {
    starting.emplace_back([this, stage, &settings, &created] {
      RankSettings rank = settings.rank;
      rank.local_rank = stage;
      auto& result = created[static_cast<std::size_t>(stage)];
      const auto topology = agree_on_topology(rank, groups_.host(stage), Deadline::after_ms(60000));
      if (topology.ok()) {
        result = RankRuntime::create(rank, *topology, groups_.host(stage), groups_.device(stage));
      } else {
        result = topology.status();
      }
    });
  }
  for (std::thread& thread : starting) thread.join();
  for (auto& rank : created) {
    EXPECT_TRUE(rank.ok()) << rank.status().to_string();
    ranks_.push_back(std::move(*rank));
    stages.push_back(ranks_.back()->info());
  }
  coordinator::SchedulerConfig config;
  config.max_num_seqs = settings.max_num_seqs;
  config.max_num_batched_tokens = settings.rank.max_num_batched_tokens;
  config.max_in_flight =
      settings.micro_batches > 0 ? settings.micro_batches : settings.n_stages + 1;
  config.max_num_queued_reqs = settings.max_num_queued_reqs;
  config.seed = settings.seed;
  config.eos_token_ids = {2, 0};
  config.limits.vocab_size = ranks_[0]->model().vocab_size;
  config.limits.max_model_len = static_cast<std::int32_t>(ranks_[0]->max_model_len());
  config.kv_model =
      make_kv_model(ranks_[0]->model(), settings.rank.kv_dtype, ranks_[0]->max_model_len(), stages);
  config.profile_table = settings.profile_table;
  config.session_ttl_us = settings.session_ttl_us;
  const coordinator::KvLedger ledger = make_ledger(ranks_[0]->store().shape(), stages);
  engine_ = std::make_unique<PipelineEngine>(groups_.host(0), config, ledger, stages,
                                             PipelineEngineOptions{}, [this](const Status& status) {
                                               ADD_FAILURE()
                                                   << "the engine failed: " << status.to_string();
                                               groups_.host(0).abort(1, status.message());
                                             });
  if (settings.balances) {
    coordinator::KvBalanceOptions options;
    options.typical_tokens = 600;
    options.warmup_us = 0;
    options.cooldown_us = 0;
    options.relief_hold_us = 0;
    auto balance =
        coordinator::make_kv_balance(options, balanced_policy(), config, ledger.stages());
    EXPECT_TRUE(balance.ok() && balance->has_value()) << balance.status().to_string();
    engine_->set_balancer(std::move((*balance)->balancer), std::move((*balance)->ladder));
    ranks_.front()->worker().set_decide_budget(
        [this](std::span<const coordinator::BudgetReport> reports) {
          return engine_->balance(reports);
        });
  }
  for (auto& rank : ranks_) {
    threads_.emplace_back([&rank] {
      const Status status = rank->worker().run();
      EXPECT_TRUE(status.ok()) << status.to_string();
    });
  }
  engine_->start();
}

TestCluster::~TestCluster() { stop(); }

void TestCluster::stop() {
  engine_->stop();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

std::shared_ptr<CollectingSink> TestCluster::submit(engine::EngineRequest request,
                                                    engine::RequestHandle* handle) {
  auto sink = std::make_shared<CollectingSink>(request.sampling.n_choices);
  auto submitted = engine_->submit(std::move(request), sink);
  if (!submitted.ok()) sink->on_end(submitted.status(), {});
  if (submitted.ok() && handle != nullptr) *handle = *submitted;
  return sink;
}

engine::EngineRequest greedy_request(std::vector<std::int32_t> prompt, int max_tokens) {
  engine::EngineRequest request;
  request.prompt_ids = std::move(prompt);
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  return request;
}

std::vector<GoldenGreedy> load_golden_greedy(std::size_t max_prompt) {
  std::ifstream file(source_dir() + "/tests/golden/golden.json");
  std::stringstream text;
  text << file.rdbuf();
  const boost::json::value root = boost::json::parse(text.str());
  std::vector<GoldenGreedy> cases;
  for (const boost::json::value& entry : root.at("greedy").as_array()) {
    GoldenGreedy golden;
    golden.name = std::string(entry.at("name").as_string());
    golden.prompt = boost::json::value_to<std::vector<std::int32_t>>(entry.at("prompt_ids"));
    golden.output = boost::json::value_to<std::vector<std::int32_t>>(entry.at("greedy_ids"));
    if (golden.output.back() == 2 || golden.output.back() == 0) {
      golden.output.pop_back();
      golden.ends_with_eos = true;
    }
    if (golden.prompt.size() <= max_prompt) cases.push_back(std::move(golden));
  }
  return cases;
}

std::string mini_model_dir() { return source_dir() + "/models/spindle-mini"; }

}  // namespace spindle::worker
