// What the KV balancer buys a pipeline of stages with unequal memory: requests that run together
// and tokens per second, with requests waiting all the time.
//
//   mpirun -n 2 build/bin/balance_bench --device cuda --dummy --model models/shapes/llama-3-8b
//       --kv-bytes 12000000000,4000000000 --balance --json FILE
//
// Every rank takes part; rank 0 submits requests to the real engine, without sockets and text. One
// run is with balancing or without: two runs are compared.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <boost/json.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cluster/coordinator/kv_balance.h"
#include "worker/bench/bench_rank.h"
#include "worker/daemon/cluster_start.h"
#include "worker/engine/pipeline_engine.h"

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

struct Options : BenchOptions {
  bool balance = false;
  bool lighter = false;
  std::vector<std::int64_t> kv_bytes = {std::int64_t{1} << 28};
  int min_prompt = 1024;
  int max_prompt = 2048;
  int output = 256;
  int min_output = 0;  // 0: as many as `output`
  int clients = 64;
  double settle = 30;
  double seconds = 60;
  std::uint64_t seed = 1;
};

// Clients that submit their next request when the last one ended. Outlives the engine's work.
class Load {
 public:
  Load(PipelineEngine& engine, const Options& options, int vocab_size)
      : engine_(engine), options_(options), vocab_size_(vocab_size), random_(options.seed) {}

  void start() {
    idle_clients_ = options_.clients;
    submitter_ = std::thread([this] { submit_all(); });
  }
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_one();
    if (submitter_.joinable()) submitter_.join();
  }
  int n_failed() const { return n_failed_; }

 private:
  class Sink final : public engine::EventSink {
   public:
    explicit Sink(Load& load) : load_(load) {}
    void on_tokens(std::span<const engine::TokenEvent> /*events*/) override {}
    void on_end(const Status& status, const engine::RequestSummary& /*summary*/) override {
      load_.on_end(status);
    }

   private:
    Load& load_;
  };

  void on_end(const Status& status) {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    if (!status.ok()) {
      ++n_failed_;
      std::fprintf(stderr, "a request failed: %s\n", status.to_string().c_str());
    }
    ++idle_clients_;
    changed_.notify_one();
  }
  void submit_all() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || idle_clients_ > 0; });
      if (stopping_) return;
      --idle_clients_;
      lock.unlock();
      submit();
      lock.lock();
    }
  }
  void submit() {
    engine::EngineRequest request;
    std::uniform_int_distribution<int> length(options_.min_prompt, options_.max_prompt);
    std::uniform_int_distribution<std::int32_t> token(16, vocab_size_ - 1);
    const int n = length(random_);
    for (int i = 0; i < n; ++i) request.prompt_ids.push_back(token(random_));
    std::uniform_int_distribution<int> output(
        options_.min_output > 0 ? options_.min_output : options_.output, options_.output);
    request.sampling.max_tokens = output(random_);
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.kv_policy = options_.kv_policy;
    const auto handle = engine_.submit(std::move(request), std::make_shared<Sink>(*this));
    if (handle.ok()) return;
    ++n_failed_;
    std::fprintf(stderr, "refused: %s\n", handle.status().to_string().c_str());
  }

  PipelineEngine& engine_;
  const Options& options_;
  const int vocab_size_;
  std::mt19937_64 random_;  // the submitter's
  std::thread submitter_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int idle_clients_ = 0;   // guarded by mutex_
  bool stopping_ = false;  // guarded by mutex_
  std::atomic<int> n_failed_{0};
};

boost::json::object measure(PipelineEngine& engine, Load& load, const Options& options) {
  load.start();
  std::this_thread::sleep_for(std::chrono::duration<double>(options.settle));
  const engine::EngineStats before = engine.stats();
  const Clock::time_point began = Clock::now();
  double running = 0;
  int n_samples = 0;
  int n_full = 0;
  std::vector<double> used(before.stages.size());
  const auto share = [](const engine::StageState& stage) {
    return static_cast<double>(stage.kv_committed_bytes) /
           static_cast<double>(stage.kv_capacity_bytes);
  };
  while (Clock::now() - began < std::chrono::duration<double>(options.seconds)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const engine::EngineStats stats = engine.stats();
    running += stats.running;
    ++n_samples;
    const bool full = std::any_of(stats.stages.begin(), stats.stages.end(),
                                  [&](const auto& stage) { return share(stage) >= 0.9; });
    if (!full) continue;
    ++n_full;
    for (std::size_t s = 0; s < used.size(); ++s) used[s] += share(stats.stages[s]);
  }
  const engine::EngineStats after = engine.stats();
  const double seconds = std::chrono::duration<double>(Clock::now() - began).count();
  load.stop();
  boost::json::array stages;
  for (std::size_t s = 0; s < after.stages.size(); ++s) {
    const double busy = after.stages[s].busy_seconds - before.stages[s].busy_seconds;
    stages.push_back({{"kv_capacity_bytes", after.stages[s].kv_capacity_bytes},
                      {"level_ratio", after.stages[s].kv_level_ratio},
                      {"committed_share_when_one_is_full", n_full > 0 ? used[s] / n_full : 0.0},
                      {"busy_share", busy / seconds}});
  }
  const auto steps = static_cast<double>(after.steps - before.steps);
  const auto generated = static_cast<double>(after.generation_tokens - before.generation_tokens);
  const auto prefilled = static_cast<double>(after.prompt_tokens - before.prompt_tokens);
  return {{"balance", options.balance},
          {"seconds", seconds},
          {"running_mean", running / std::max(n_samples, 1)},
          {"generated_tokens_per_s", generated / seconds},
          {"prompt_tokens_per_s", prefilled / seconds},
          {"requests_per_s", static_cast<double>(after.finished - before.finished) / seconds},
          {"preemptions", after.preemptions - before.preemptions},
          {"recomputed_tokens", after.recomputed_tokens - before.recomputed_tokens},
          {"steps", steps},
          {"budget_plans", after.budget_plans},
          {"budget_rounds", after.budget_rounds - before.budget_rounds},
          {"budget_share_of_time", (after.budget_seconds - before.budget_seconds) / seconds},
          {"wanted_requests", after.wanted_requests},
          {"fitting_requests", after.fitting_requests},
          {"n_samples", n_samples},
          {"n_full", n_full},
          {"n_failed", load.n_failed()},
          {"stages", std::move(stages)}};
}

Options parse(int argc, char** argv, CLI::App& app) {
  Options options;
  options.max_num_seqs = 256;
  options.kv_policy.profile = kvstore::KvProfile::kSpindle;
  options.kv_policy.ratio = 0.25;
  options.kv_policy.best_effort = true;  // so that the size is the balancer's to change
  add_bench_options(app, options);
  app.add_flag("--balance", options.balance, "balance KV budgets");
  app.add_flag("--lighter", options.lighter, "levels lighter than --kv-ratio too");
  app.add_option("--kv-bytes", options.kv_bytes, "KV pool of the ranks: one, or one each")
      ->delimiter(',');
  app.add_option("--min-prompt", options.min_prompt, "tokens")->check(CLI::PositiveNumber);
  app.add_option("--max-prompt", options.max_prompt, "tokens")->check(CLI::PositiveNumber);
  app.add_option("--output", options.output, "tokens of each answer")->check(CLI::PositiveNumber);
  app.add_option("--min-output", options.min_output,
                 "answers of any length from here to --output; 0: all of that one")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--clients", options.clients, "requests under way")->check(CLI::PositiveNumber);
  app.add_option("--settle", options.settle, "seconds before the measured time");
  app.add_option("--seconds", options.seconds, "measured time");
  app.add_option("--seed", options.seed, "of the prompts");
  app.parse(argc, argv);
  if (options.min_prompt > options.max_prompt) {
    throw CLI::ValidationError("--min-prompt", "is longer than --max-prompt");
  }
  if (options.min_output > options.output) {
    throw CLI::ValidationError("--min-output", "is longer than --output");
  }
  return options;
}

Status serve(comm::MpiWorld& world, BenchRank& rank, const Options& options) {
  coordinator::SchedulerConfig config = bench_scheduler_config(rank, options);
  config.max_num_queued_reqs = 1 << 20;
  config.max_num_queued_tokens = std::int64_t{1} << 40;
  const coordinator::KvLedger ledger = make_ledger(rank.runtime->store().shape(), rank.stages);
  PipelineEngine engine(
      world.host(), config, ledger, rank.stages, {},
      [&world](const Status& status) { world.host().abort(1, status.to_string()); });
  if (options.balance) {
    coordinator::KvBalanceOptions balance;
    balance.lighter_levels = options.lighter;
    balance.ladder.n_stronger = 55;  // to a fifth of the policy's own size
    balance.typical_tokens = (options.min_prompt + options.max_prompt) / 2;
    balance.warmup_us = 2'000'000;
    balance.cooldown_us = 2'000'000;
    balance.relief_hold_us = 4'000'000;
    auto made = coordinator::make_kv_balance(balance, options.kv_policy, config, ledger.stages());
    if (!made.ok()) return made.status();
    if (!*made) return invalid_argument("there is nothing to balance");
    engine.set_balancer(std::move((*made)->balancer), std::move((*made)->ladder));
    rank.runtime->worker().set_decide_budget(
        [&engine](std::span<const coordinator::BudgetReport> reports) {
          return engine.balance(reports);
        });
  }
  std::thread stage_thread([&] {
    const Status ended = rank.runtime->worker().run();
    if (!ended.ok()) world.host().abort(1, ended.to_string());
  });
  engine.start();
  Load load(engine, options, rank.runtime->model().vocab_size);
  const boost::json::object report = measure(engine, load, options);
  engine.stop();
  stage_thread.join();
  const std::string text = boost::json::serialize(report);
  std::printf("%s\n", text.c_str());
  if (!options.json_file.empty()) std::ofstream(options.json_file) << text << "\n";
  return ok_status();
}

int run(int argc, char** argv) {
  CLI::App app{"What the KV balancer buys a pipeline of unequal memories"};
  Options options;
  try {
    options = parse(argc, argv, app);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  auto world = comm::MpiWorld::init();
  CHECK(world.ok(), world.status().to_string());
  auto rank = start_bench_rank(**world, options, options.kv_bytes);
  if (!rank.ok()) {
    std::fprintf(stderr, "balance_bench: %s\n", rank.status().to_string().c_str());
    return 1;
  }
  const Status status =
      (*world)->rank() == 0 ? serve(**world, *rank, options) : rank->runtime->worker().run();
  if (status.ok()) return 0;
  (*world)->host().abort(1, status.to_string());
  return 1;
}

}  // namespace
}  // namespace spindle::worker

int main(int argc, char** argv) { return spindle::worker::run(argc, argv); }
