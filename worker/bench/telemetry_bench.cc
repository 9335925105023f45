// What measuring costs: a scrape of a large cluster, and what stages and front end do for metrics
// in each decode step, beside that step's own time in the same run.
//
//   mpirun -n 1 telemetry_bench --model models/spindle-mini

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cluster/api/state_json.h"
#include "cluster/telemetry/metrics.h"
#include "kvstore/kv_usage.h"
#include "worker/bench/bench_rank.h"
#include "worker/daemon/cluster_start.h"
#include "worker/engine/pipeline_engine.h"
#include "worker/stage/stage_clock.h"

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

struct Options : BenchOptions {
  int batch = 32;
  int prompt_tokens = 128;
  int output_tokens = 200;
};

double seconds_since(Clock::time_point began) {
  return std::chrono::duration<double>(Clock::now() - began).count();
}

// Seconds of one call: the least of five runs of at least 20 ms.
template <typename Call>
double seconds_of(Call&& call) {
  double best = 1e9;
  for (int run = 0; run < 5; ++run) {
    const Clock::time_point began = Clock::now();
    int n = 0;
    do {
      call();
      ++n;
    } while (seconds_since(began) < 0.02);
    best = std::min(best, seconds_since(began) / n);
  }
  return best;
}

class CountingSink final : public engine::EventSink {
 public:
  explicit CountingSink(std::atomic<std::int64_t>& n_ended) : n_ended_(n_ended) {}
  void on_tokens(std::span<const engine::TokenEvent> /*events*/) override {}
  void on_end(const Status& status, const engine::RequestSummary& /*summary*/) override {
    CHECK(status.ok(), status.to_string());
    ++n_ended_;
  }

 private:
  std::atomic<std::int64_t>& n_ended_;
};

// Seconds of a step while all requests decode.
double decode_step_seconds(PipelineEngine& engine, int vocab_size, const Options& options) {
  std::atomic<std::int64_t> n_ended{0};
  std::mt19937 random(20261129);
  const std::uint64_t before = engine.stats().generation_tokens;
  for (int i = 0; i < options.batch; ++i) {
    engine::EngineRequest request;
    for (int t = 0; t < options.prompt_tokens; ++t) {
      request.prompt_ids.push_back(
          static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab_size)));
    }
    request.sampling.temperature = 0;
    request.sampling.max_tokens = options.output_tokens;
    request.sampling.ignore_eos = true;
    request.kv_policy = options.kv_policy;
    const auto handle = engine.submit(std::move(request), std::make_shared<CountingSink>(n_ended));
    CHECK(handle.ok(), handle.status().to_string());
  }
  const auto wait_for = [&](std::uint64_t n_tokens) {
    const Deadline deadline = Deadline::after_ms(600000);
    while (engine.stats().generation_tokens - before < n_tokens) {
      CHECK(!deadline.passed(), "the requests take more than ten minutes");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  };
  const auto batch = static_cast<std::uint64_t>(options.batch);
  const auto n_output = static_cast<std::uint64_t>(options.output_tokens);
  // Prompts are done and the first requests have not ended in between.
  wait_for(batch * (n_output / 4));
  const std::uint64_t first = engine.stats().steps;
  const Clock::time_point began = Clock::now();
  wait_for(batch * (n_output * 3 / 4));
  const double passed = seconds_since(began);
  const std::uint64_t n_steps = engine.stats().steps - first;
  const Deadline deadline = Deadline::after_ms(600000);
  while (n_ended < options.batch) {
    CHECK(!deadline.passed(), "the requests take more than ten minutes");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return passed / static_cast<double>(n_steps);
}

// A stage with this rank's numbers of layers and heads, as far as its sums go.
struct StageCosts {
  double marks = 0;    // of a step in the middle of the pipeline, with the report's fields
  double pages = 0;    // counting a sequence anew when it takes pages
  double layers = 0;   // a report of all layers
  double latency = 0;  // of one token, on rank 0
};

StageCosts stage_costs(const RankRuntime& rank) {
  StageCosts costs;
  HostStageClock clock;
  control::StepResult result;
  costs.marks = seconds_of([&] {
    for (const StageTime what : {StageTime::kEmpty, StageTime::kEmpty, StageTime::kOther,
                                 StageTime::kUpstream, StageTime::kBusy, StageTime::kDownstream}) {
      clock.mark(what);
    }
    const StageTimes times = clock.take();
    result.set_busy_us(times[StageTime::kBusy]);
    result.set_empty_us(times[StageTime::kEmpty]);
    result.set_upstream_us(times[StageTime::kUpstream]);
    result.set_downstream_us(times[StageTime::kDownstream]);
    result.set_compress_us(times[StageTime::kCompress]);
  });
  const int n_layers = rank.store().n_layers();
  const int n_heads = rank.store().shape().n_kv_heads;
  kvstore::KvUsage usage(n_layers, n_heads);
  const kvstore::HeadCache cache;
  costs.pages = seconds_of([&] {
    for (int layer = 0; layer < n_layers; ++layer) {
      for (int head = 0; head < n_heads; ++head) {
        usage.remove(static_cast<std::size_t>(layer), cache, 4096);
        usage.add(static_cast<std::size_t>(layer), cache, 8192);
      }
    }
  });
  costs.layers = seconds_of([&] {
    const kvstore::KvUse use = usage.report();
    control::KvReport& report = *result.mutable_kv();
    report.Clear();
    report.mutable_form_bytes()->Add(use.form_bytes.begin(), use.form_bytes.end());
    for (const kvstore::KvUse::Layer& layer : use.layers) {
      report.add_layer_used_bytes(layer.used_bytes);
      report.add_layer_retained_tokens(layer.retained_tokens);
      report.add_layer_plan(static_cast<std::uint32_t>(layer.plan_kind + 1));
    }
  });
  telemetry::Metrics metrics("bench");
  double latency = 0.001;
  costs.latency = seconds_of([&] {
    metrics.observe_inter_token_latency(latency);
    latency = latency > 1 ? 0.001 : latency * 1.1;
  });
  return costs;
}

void print_step(const RankRuntime& rank, double step_seconds, const Options& options) {
  const StageCosts costs = stage_costs(rank);
  // Every sequence takes pages once in so many steps; layers are reported four times a second.
  const double pages = costs.pages * options.batch / rank.store().shape().page_tokens;
  const double layers = costs.layers * step_seconds / 0.25;
  const double latency = costs.latency * options.batch;
  const double all = costs.marks + pages + layers + latency;
  std::printf("decode step of %d requests: %.3f ms; for metrics %.2f us of it, %.4f %%\n",
              options.batch, 1e3 * step_seconds, 1e6 * all, 100 * all / step_seconds);
  std::printf(
      "  marks and their report %.3f us, counting pages %.3f us, layers %.3f us (%.1f us each), "
      "token latencies on rank 0 %.3f us\n",
      1e6 * costs.marks, 1e6 * pages, 1e6 * layers, 1e6 * costs.layers, 1e6 * latency);
}

engine::EngineSnapshot large_snapshot(int n_stages, int n_layers) {
  engine::EngineSnapshot snapshot;
  engine::StageState stage;
  stage.device = "NVIDIA H200 (GPU 0)";
  stage.host = "node-0000";
  stage.n_layers = n_layers;
  stage.kv_capacity_bytes = 1ULL << 36;
  stage.kv_used_bytes = stage.kv_committed_bytes = 45678901234;
  stage.busy_seconds = 123456.789;
  stage.bubble = {12.5, 345.678, 0.25};
  stage.kv_form_bytes.fill(1234567890);
  stage.layers.assign(static_cast<std::size_t>(n_layers),
                      {100, 357913941, 1431655765, "EVICT lloyd4", 1000000, 250000});
  snapshot.stats.stages.assign(static_cast<std::size_t>(n_stages), stage);
  for (int s = 0; s < n_stages; ++s) snapshot.stats.stages[static_cast<std::size_t>(s)].stage = s;
  snapshot.moves.assign(engine::kMaxBudgetMoves,
                        {1700000000000, 1000, 3, 0.3, 0.2, "14.7 requests should run together"});
  snapshot.active_requests.assign(engine::kMaxActiveRequests, {});
  return snapshot;
}

void print_scrape(const char* what, const telemetry::Metrics& metrics,
                  const engine::EngineSnapshot& snapshot) {
  std::size_t n_text = 0;
  const double text = seconds_of([&] { n_text = metrics.render(snapshot.stats).size(); });
  std::size_t n_json = 0;
  const telemetry::Latencies latencies = metrics.latencies();
  const double json = seconds_of([&] {
    n_json = api::state_json({"m", "1", 1, 1, 1}, snapshot, latencies).size();
  });
  std::printf("%s: /metrics %.3f ms, %zu bytes; state %.3f ms, %zu bytes\n", what, 1e3 * text,
              n_text, 1e3 * json, n_json);
}

int run(int argc, char** argv) {
  CLI::App app{"What measuring costs"};
  Options options;
  add_bench_options(app, options);
  app.add_option("--batch", options.batch, "requests at once")->check(CLI::Range(1, 4096));
  app.add_option("--prompt-tokens", options.prompt_tokens)->check(CLI::PositiveNumber);
  app.add_option("--output-tokens", options.output_tokens)->check(CLI::Range(8, 1 << 20));
  CLI11_PARSE(app, argc, argv);
  options.max_num_seqs = std::max(options.max_num_seqs, options.batch);
  auto world = comm::MpiWorld::init();
  CHECK(world.ok(), world.status().to_string());
  comm::HostGroup& host = (*world)->host();
  auto started = start_bench_rank(**world, options, {});
  if (!started.ok()) {
    std::fprintf(stderr, "telemetry_bench: %s\n", started.status().to_string().c_str());
    return 1;
  }
  RankRuntime& rank = *started->runtime;
  std::thread stage_thread([&] {
    const Status ended = rank.worker().run();
    if (!ended.ok()) host.abort(1, ended.to_string());
  });
  if (host.rank() == 0) {
    PipelineEngine engine(host, bench_scheduler_config(*started, options),
                          make_ledger(rank.store().shape(), started->stages), started->stages, {},
                          [&host](const Status& status) { host.abort(1, status.to_string()); });
    engine.start();
    const double step = decode_step_seconds(engine, rank.model().vocab_size, options);
    print_step(rank, step, options);
    const telemetry::Metrics metrics(
        telemetry::MetricsOptions{.model_name = "bench", .version = "1", .vllm_names = true});
    print_scrape("this cluster", metrics, engine.snapshot());
    print_scrape("64 stages of 2 layers", metrics, large_snapshot(64, 2));
    print_scrape("64 stages of 128 layers", metrics, large_snapshot(64, 128));
    engine.stop();
  }
  stage_thread.join();
  return 0;
}

}  // namespace
}  // namespace spindle::worker

int main(int argc, char** argv) { return spindle::worker::run(argc, argv); }
