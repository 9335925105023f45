#include "worker/daemon/daemon.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cluster/comm/agreement.h"
#include "cluster/comm/peer_monitor.h"
#include "cluster/coordinator/kv_balance.h"
#include "kernels/cuda/devices.h"
#include "worker/config/cluster_settings.h"
#include "worker/config/config_text.h"
#include "worker/config/kv_policy.h"
#include "worker/config/options.h"
#include "worker/config/profile_table.h"
#include "worker/daemon/cluster_start.h"
#include "worker/daemon/front_end.h"
#include "worker/daemon/host_resources.h"
#include "worker/daemon/rank_orders.h"
#include "worker/daemon/rank_runtime.h"
#include "worker/daemon/signals.h"
#include "worker/daemon/stop_latch.h"
#include "worker/daemon/topology.h"
#include "worker/engine/pipeline_engine.h"
#include "worker/logging/logging.h"
#include "worker/logging/summary_line.h"
#include "worker/model/generation_config.h"

namespace spindle::worker {
namespace {

// For responses under way once all requests have ended.
constexpr std::int64_t kFarewellMs = 2000;

// KV that may wait, in pools.
constexpr std::uint64_t kQueuedPools = 16;

// Operations on a token in a layer's products, to those of its attention on one token before it.
std::int64_t attention_parity_tokens(const model::ModelConfig& model) {
  const std::int64_t hidden = model.hidden_size;
  const std::int64_t query = std::int64_t{model.n_heads} * model.head_dim;
  const std::int64_t key = std::int64_t{model.n_kv_heads} * model.head_dim;
  const std::int64_t weights =
      hidden * (2 * query + 2 * key) + 3 * hidden * model.intermediate_size;
  return weights / (2 * query);
}

RankSettings rank_settings(const config::Config& config, const comm::MpiWorld& world) {
  const HostResources resources = read_host_resources();
  RankSettings settings;
  static_cast<coordinator::ClusterSettings&>(settings) = config::cluster_settings(config);
  settings.model_dir = config.model().path();
  settings.dummy_weights = config.model().load_format() == config::Model::DUMMY;
  settings.n_threads = config.compute().has_threads_per_rank()
                           ? config.compute().threads_per_rank()
                           : default_threads_per_rank(resources.n_cores, world.local_size());
  settings.host_name = world.host_name();
  settings.host_memory_bytes = resources.total_memory_bytes;
  settings.available_memory_bytes = resources.available_memory_bytes;
  settings.ranks_on_host = world.local_size();
  settings.local_rank = world.local_rank();
  settings.startup_timeout = std::chrono::milliseconds(config.cluster().startup_timeout_ms());
  settings.worker.step_timeout = std::chrono::milliseconds(config.cluster().step_timeout_ms());
  return settings;
}

coordinator::SchedulerConfig scheduler_config(const config::Config& config, const RankRuntime& rank,
                                              const model::GenerationConfig& generation,
                                              const std::vector<control::StageInfo>& stages) {
  const int n_stages = static_cast<int>(stages.size());
  const config::Scheduler& scheduler = config.scheduler();
  coordinator::SchedulerConfig out;
  out.max_num_seqs = scheduler.max_num_seqs();
  out.max_num_batched_tokens = scheduler.max_num_batched_tokens();
  out.max_in_flight =
      config.cluster().has_micro_batches() ? config.cluster().micro_batches() : n_stages + 1;
  out.max_num_queued_reqs = scheduler.max_num_queued_reqs();
  out.max_num_queued_tokens = scheduler.max_num_queued_tokens();
  std::uint64_t pool_bytes = 0;
  for (const control::StageInfo& stage : stages) pool_bytes += stage.kv_capacity_bytes();
  out.max_queued_kv_bytes = scheduler.has_max_queued_kv_bytes()
                                ? static_cast<std::uint64_t>(scheduler.max_queued_kv_bytes())
                                : kQueuedPools * pool_bytes;
  out.attention_parity_tokens = attention_parity_tokens(rank.model());
  std::random_device entropy;
  out.seed = scheduler.has_seed() ? scheduler.seed()
                                  : (static_cast<std::uint64_t>(entropy()) << 32) | entropy();
  out.eos_token_ids =
      generation.eos_token_ids.empty() ? rank.model().eos_token_ids : generation.eos_token_ids;
  out.limits.vocab_size = rank.model().vocab_size;
  out.limits.max_model_len = static_cast<std::int32_t>(rank.max_model_len());
  out.kv_model =
      make_kv_model(rank.model(), rank.store().shape().dtype, rank.max_model_len(), stages);
  out.budget_report_steps = config.kv().balance().report_steps();
  out.max_sessions = config.kv().max_sessions();
  out.session_ttl_us = config.kv().session_ttl_ms() * 1000;
  out.max_session_bytes = static_cast<std::uint64_t>(config.kv().max_session_bytes());
  const config::Limits& limits = config.api().limits();
  out.limits.max_n = limits.max_n();
  out.limits.max_logprobs = limits.max_logprobs();
  out.limits.max_logit_bias = limits.max_logit_bias();
  return out;
}

void log_topology(const std::vector<control::StageInfo>& stages, const RankRuntime& rank) {
  const kvstore::KvShape& shape = rank.store().shape();
  for (const control::StageInfo& stage : stages) {
    const std::uint64_t token_bytes =
        shape.token_bytes() * static_cast<std::uint64_t>(shape.n_kv_heads * stage.n_layers());
    spdlog::info(
        "stage {}: layers {}-{} on {}, {}; weights {:.1f} MB, KV pool {:.1f} MB = {} tokens",
        stage.stage(), stage.first_layer(), stage.first_layer() + stage.n_layers() - 1,
        stage.host(), stage.device(), static_cast<double>(stage.weight_bytes()) / 1e6,
        static_cast<double>(stage.kv_capacity_bytes()) / 1e6,
        stage.kv_capacity_bytes() / token_bytes);
    if (stage.instruction_set() != stages.front().instruction_set()) {
      spdlog::warn(
          "stage {} computes with {}, stage 0 with {}: another split of the layers may give other "
          "last bits",
          stage.stage(), stage.instruction_set(), stages.front().instruction_set());
    }
  }
}

// What all ranks compute on. AUTO takes the GPUs only when no rank would be left without one.
Result<ComputeDevice> choose_device(const config::Config& config, comm::HostGroup& host,
                                    Deadline deadline) {
  if (config.compute().device() == config::Compute::CPU) return ComputeDevice::kCpu;
  if (config.compute().device() == config::Compute::CUDA) return ComputeDevice::kCuda;
  const auto devices = kernels::list_cuda_devices();
  const bool has_gpu = devices.ok() && !devices->empty();
  auto all = host.all_gather(has_gpu ? "gpu" : "", deadline);
  if (!all.ok()) return all.status();
  const auto without = std::count(all->begin(), all->end(), "");
  if (without == 0) return ComputeDevice::kCuda;
  if (host.rank() == 0 && without < host.size()) {
    spdlog::warn("{} of {} ranks have no GPU, so all compute on the CPU", without, host.size());
  }
  return ComputeDevice::kCpu;
}

Result<std::optional<coordinator::KvBalance>> kv_balance(
    const config::Config& config, const coordinator::SchedulerConfig& scheduler,
    std::span<const coordinator::StageCapacity> stages) {
  const config::Balance& balance = config.kv().balance();
  if (!balance.enabled()) return std::optional<coordinator::KvBalance>();
  auto policy = config::to_kv_policy(config.kv().policy());
  if (!policy.ok()) return policy.status();
  policy->best_effort = true;  // a default is nobody's wish
  coordinator::KvBalanceOptions options;
  options.ladder = {balance.level_step(), balance.n_lighter(), balance.n_stronger()};
  options.lighter_levels = balance.lighter_levels();
  options.typical_tokens = balance.typical_tokens();
  options.warmup_us = std::int64_t{balance.warmup_ms()} * 1000;
  options.cooldown_us = std::int64_t{balance.cooldown_ms()} * 1000;
  options.relief_margin = balance.relief_margin();
  options.relief_hold_us = std::int64_t{balance.relief_hold_ms()} * 1000;
  return coordinator::make_kv_balance(options, *policy, scheduler, stages);
}

void log_levels(const coordinator::KvBalance& balance, std::size_t n_stages) {
  const std::vector<double>& ratios = balance.ladder.ratios;
  spdlog::info(
      "KV budgets of {} stages are balanced over {} levels from {:.3f} to {:.3f}; the policy's own "
      "is {:.3f}",
      n_stages, ratios.size(), ratios.front(), ratios.back(), ratios[balance.ladder.own]);
}

// What every recording says of the cluster.
Trace about_trace(const config::Config& config, const std::vector<control::StageInfo>& stages,
                  int micro_batches) {
  Trace trace;
  trace.model = config.model().served_model_name();
  trace.server_version = config::spindle_version();
  trace.micro_batches = micro_batches;
  for (const control::StageInfo& stage : stages) {
    RankTrace& rank = trace.ranks.emplace_back();
    rank.rank = stage.stage();
    rank.device = stage.device();
    rank.first_layer = stage.first_layer();
    rank.n_layers = stage.n_layers();
  }
  return trace;
}

// Rank 0's part: the engine and the front end, until `stop` is requested.
class Coordinator {
 public:
  static Result<std::unique_ptr<Coordinator>> create(comm::MpiWorld& world,
                                                     const config::Config& config,
                                                     RankRuntime& rank,
                                                     const std::vector<control::StageInfo>& stages,
                                                     StepRecorder& recorder, StopLatch& stop) {
    auto generation = model::load_generation_config(config.model().path());
    if (!generation.ok()) return generation.status();
    coordinator::SchedulerConfig scheduler = scheduler_config(config, rank, *generation, stages);
    std::unique_ptr<Coordinator> self(new Coordinator(
        world.host(), config, recorder, about_trace(config, stages, scheduler.max_in_flight)));
    PipelineEngineOptions options;
    options.recorder = &recorder;
    options.step_timeout = std::chrono::milliseconds(config.cluster().step_timeout_ms());
    if (!config.kv().profile_table().empty()) {
      auto table = config::load_profile_table(config.kv().profile_table(), rank.model().n_layers,
                                              rank.model().n_kv_heads);
      if (!table.ok()) return table.status();
      scheduler.profile_table = std::make_shared<kvstore::ProfileTable>(std::move(*table));
    } else if (config.kv().policy().profile() == "spindle") {
      spdlog::warn(
          "kv.policy.profile is spindle and kv.profile_table is not set: which heads must keep all "
          "tokens is not known, so quality falls sooner; see spindle eval --calibrate");
    }
    coordinator::KvLedger ledger = make_ledger(rank.store().shape(), stages);
    auto balance = kv_balance(config, scheduler, ledger.stages());
    if (!balance.ok()) return balance.status();
    self->engine_ = std::make_unique<PipelineEngine>(
        world.host(), std::move(scheduler), std::move(ledger), stages, options,
        [&world](const Status& status) { world.host().abort(kExitFailed, status.to_string()); });
    PipelineEngine& engine = *self->engine_;
    if (balance->has_value()) {
      log_levels(**balance, stages.size());
      engine.set_balancer(std::move((*balance)->balancer), std::move((*balance)->ladder));
      rank.worker().set_decide_budget(
          [&engine](std::span<const coordinator::BudgetReport> reports) {
            return engine.balance(reports);
          });
    }
    FrontEndOptions front_end;
    front_end.config = config;
    front_end.generation = *generation;
    front_end.n_stages = world.size();
    front_end.admin = &self->admin_;
    front_end.on_drain = [&engine, &stop] {
      engine.start_draining();
      stop.request("a client asked to drain");
    };
    auto started = FrontEnd::start(engine, std::move(front_end));
    if (!started.ok()) return started.status();
    self->front_end_ = std::move(*started);
    return self;
  }

  void serve(StopLatch& stop) {
    engine_->start();
    if (front_end_->http_port() != 0) {
      spdlog::info("ready: http://{}:{}/v1", config_.api().http().host(), front_end_->http_port());
    }
    if (front_end_->tcp_port() != 0) {
      spdlog::info("ready: tcp {}:{}", config_.api().tcp().host(), front_end_->tcp_port());
    }
    std::optional<SummaryLogger> summaries;
    const std::chrono::milliseconds interval(config_.log().summary_interval_ms());
    if (interval.count() > 0) {
      const auto stats = [this] {
        engine::EngineStats now = engine_->stats();
        now.refused = front_end_->n_refused();  // also those that the engine never saw
        return now;
      };
      summaries.emplace(stats, interval);
    }
    spdlog::info("stopping: {}", stop.wait());
    const Status drained = engine_->drain(Deadline::after_ms(config_.api().drain_timeout_ms()));
    summaries.reset();
    admin_.stop();
    if (!drained.ok()) spdlog::warn("drain: {}", drained.message());
    engine_->stop();
    front_end_->stop(Deadline::after_ms(kFarewellMs));
    const engine::EngineStats stats = engine_->stats();
    spdlog::info("served {} requests: {} finished, {} cancelled, {} failed", stats.accepted,
                 stats.finished, stats.cancelled, stats.failed);
  }

 private:
  Coordinator(comm::HostGroup& host, config::Config config, StepRecorder& recorder, Trace about)
      : config_(std::move(config)),
        orders_(host, rank_order_handler(recorder)),
        admin_(orders_, std::move(about)) {}

  config::Config config_;
  OrderClient orders_;
  RankAdmin admin_;
  std::unique_ptr<PipelineEngine> engine_;
  std::unique_ptr<FrontEnd> front_end_;  // uses the engine: goes first
};

// A failure that every rank knows of: rank 0 says it, all leave in order.
int leave(const comm::MpiWorld& world, const Status& status) {
  if (world.rank() == 0) spdlog::error("{}", status.message());
  return kExitCannotStart;
}

}  // namespace

int run_daemon(comm::MpiWorld& world, const config::Config& config) {
  start_logging(config.log(), world.rank());
  comm::HostGroup& host = world.host();
  const auto startup = [&config] {
    return Deadline::after_ms(config.cluster().startup_timeout_ms());
  };
  Status status = comm::verify_same_on_all_ranks(host, "the configuration",
                                                 config::comparison_text(config), startup());
  if (!status.ok()) return leave(world, status);

  comm::PeerMonitorOptions monitor_options;
  monitor_options.peer_timeout = std::chrono::milliseconds(config.cluster().peer_timeout_ms());
  monitor_options.watch_parent = world.size() > 1;
  comm::PeerMonitor monitor(host, monitor_options, [&host](int, const std::string& message) {
    host.abort(kExitFailed, message);
  });
  monitor.start();

  RankSettings settings = rank_settings(config, world);
  settings.worker.on_step = [&monitor](std::uint64_t step) {
    monitor.report(step, comm::RankState::kServing);
  };
  StepRecorder recorder;
  settings.worker.recorder = &recorder;
  const auto device = choose_device(config, host, startup());
  status = agree_on_outcome(host, device.status(), startup());
  if (!status.ok()) return leave(world, status);
  settings.device = *device;
  world.set_waiting(choose_waiting(settings));
  const auto topology = agree_on_topology(settings, host, startup());
  if (!topology.ok()) return leave(world, topology.status());
  if (world.rank() == 0) {
    for (const std::string& line : describe_topology(*topology)) spdlog::info("{}", line);
  }
  auto rank = RankRuntime::create(settings, *topology, host, world.device());
  status = agree_on_outcome(host, rank.status(), startup());
  if (!status.ok()) return leave(world, status);
  auto stages = gather_stages(host, (*rank)->info(), startup());
  if (!stages.ok()) return leave(world, stages.status());

  set_log_stage(config.log(), world.rank(), (*rank)->info().stage());

  StopLatch stop;
  std::unique_ptr<Coordinator> coordinator;
  if (world.rank() == 0) {
    log_topology(*stages, **rank);
    auto created = Coordinator::create(world, config, **rank, *stages, recorder, stop);
    status = created.status();
    if (created.ok()) coordinator = std::move(*created);
  }
  status = agree_on_outcome(host, status, startup());
  if (!status.ok()) return leave(world, status);

  // Ranks other than 0 leave when rank 0 tells them to, whatever signal mpirun forwarded.
  const SignalWatcher signals(
      [&stop](const char* name) { stop.request(name); },
      [&host](const char* name) { host.abort(kExitAborted, std::string("second ") + name); });
  monitor.report(0, comm::RankState::kServing);
  std::optional<OrderServer> orders;
  if (world.rank() != 0) orders.emplace(host, rank_order_handler(recorder));
  std::thread stage_thread([&] {
    const Status ended = (*rank)->worker().run();
    if (!ended.ok()) host.abort(kExitFailed, ended.to_string());
  });
  if (coordinator) coordinator->serve(stop);
  stage_thread.join();
  orders.reset();
  monitor.stop();
  return kExitOk;
}

}  // namespace spindle::worker
