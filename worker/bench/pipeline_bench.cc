// Tokens per second of the whole pipeline, beside the machine's own rates in the same run.
//
//   mpirun -n 2 --bind-to none build/bin/pipeline_bench --model models/spindle-mini [--json FILE]
//
// Every rank takes part; rank 0 submits requests to the real engine, without sockets and text.
// Prefill is held against the rate of a library's matrix product, decode against the rate at which
// one thread reads memory: a decode step must at least read the weights once.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <boost/json.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cluster/comm/mpi_world.h"
#include "kernels/bench/yardsticks.h"
#include "worker/daemon/cluster_start.h"
#include "worker/daemon/rank_runtime.h"
#include "worker/engine/pipeline_engine.h"
#include "worker/model/llama_weights.h"

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPrefillTokens = 2048;
constexpr int kDecodePrompt = 128;
constexpr int kDecodeTokens = 96;
constexpr int kRepeats = 3;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// Arrival times of all tokens of a group of requests.
class TimingSink final : public engine::EventSink {
 public:
  void on_tokens(std::span<const engine::TokenEvent> events) override {
    const std::lock_guard lock(mutex_);
    times_.insert(times_.end(), events.size(), Clock::now());
  }
  void on_end(const Status& status, const engine::RequestSummary& /*summary*/) override {
    const std::lock_guard lock(mutex_);
    if (!status.ok()) std::fprintf(stderr, "a request failed: %s\n", status.to_string().c_str());
    ended_ = true;
    changed_.notify_all();
  }
  bool wait() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::minutes(10), [this] { return ended_; });
  }
  const std::vector<Clock::time_point>& times() const { return times_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Clock::time_point> times_;
  bool ended_ = false;
};

std::vector<std::int32_t> random_prompt(int n_tokens, int vocab_size, std::mt19937& random) {
  std::vector<std::int32_t> prompt(static_cast<std::size_t>(n_tokens));
  for (std::int32_t& id : prompt) {
    id = static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab_size));
  }
  return prompt;
}

class Bench {
 public:
  Bench(PipelineEngine& engine, int vocab_size) : engine_(engine), vocab_size_(vocab_size) {}

  // Prompt tokens per second when `batch` prompts of kPrefillTokens come at once.
  double prefill_rate(int batch) {
    const Clock::time_point start = Clock::now();
    run(batch, kPrefillTokens, 1);
    return batch * kPrefillTokens / seconds_between(start, Clock::now());
  }

  // Generated tokens per second while all `batch` requests decode.
  double decode_rate(int batch) {
    const auto sinks = run(batch, kDecodePrompt, kDecodeTokens);
    Clock::time_point from = Clock::time_point::min();
    Clock::time_point to = Clock::time_point::max();
    for (const auto& sink : sinks) {
      from = std::max(from, sink->times().front());
      to = std::min(to, sink->times().back());
    }
    std::int64_t n_tokens = 0;
    for (const auto& sink : sinks) {
      n_tokens += std::count_if(sink->times().begin(), sink->times().end(),
                                [&](Clock::time_point t) { return t > from && t <= to; });
    }
    return static_cast<double>(n_tokens) / seconds_between(from, to);
  }

 private:
  std::vector<std::shared_ptr<TimingSink>> run(int batch, int n_prompt, int n_output) {
    std::vector<std::shared_ptr<TimingSink>> sinks;
    for (int i = 0; i < batch; ++i) {
      engine::EngineRequest request;
      request.prompt_ids = random_prompt(n_prompt, vocab_size_, random_);
      request.sampling.temperature = 0;
      request.sampling.max_tokens = n_output;
      request.sampling.ignore_eos = true;
      sinks.push_back(std::make_shared<TimingSink>());
      const auto handle = engine_.submit(std::move(request), sinks.back());
      CHECK(handle.ok(), handle.status().to_string());
    }
    for (const auto& sink : sinks) CHECK(sink->wait(), "a request takes more than ten minutes");
    return sinks;
  }

  PipelineEngine& engine_;
  int vocab_size_;
  std::mt19937 random_{20261121};
};

template <typename Measure>
double best_of(Measure&& measure) {
  double best = 0;
  for (int i = 0; i < kRepeats; ++i) best = std::max(best, measure());
  return best;
}

// Multiplications and additions of one prompt token's linear layers and of its attention over half
// of the prompt, without the head (one row a prompt).
double prefill_flops_per_token(const model::ModelConfig& m) {
  const double linear =
      2.0 * m.n_layers * m.hidden_size *
      (m.head_dim * (2.0 * m.n_heads + 2.0 * m.n_kv_heads) + 3.0 * m.intermediate_size);
  const double attention = 4.0 * m.n_layers * m.n_heads * m.head_dim * (kPrefillTokens / 2.0);
  return linear + attention;
}

// The same for a generated token: with the head, and attention over the whole short context.
double decode_flops_per_token(const model::ModelConfig& m) {
  const double linear =
      2.0 * m.n_layers * m.hidden_size *
          (m.head_dim * (2.0 * m.n_heads + 2.0 * m.n_kv_heads) + 3.0 * m.intermediate_size) +
      2.0 * m.hidden_size * m.vocab_size;
  const double attention =
      4.0 * m.n_layers * m.n_heads * m.head_dim * (kDecodePrompt + kDecodeTokens / 2.0);
  return linear + attention;
}

// The machine's rates with all ranks measuring at the same time, summed: ranks may share a core's
// arithmetic units or the memory.
struct Yardsticks {
  double gemm_flops = 0;       // 0: no library to compare with
  double read_gb_per_s = 0;    // from a buffer of the rank's weights' size
  double memory_gb_per_s = 0;  // from 512 MB
};

Result<Yardsticks> measure_yardsticks(comm::HostGroup& host, std::uint64_t weight_bytes) {
  const Deadline deadline = Deadline::after_ms(60000);
  if (Status status = host.barrier(deadline); !status.ok()) return status;
  const auto product = kernels::onednn_f32_product(512, 2048, 2048);
  Yardsticks mine;
  if (product) mine.gemm_flops = 2.0 * 512 * 2048 * 2048 / kernels::best_seconds(product);
  mine.read_gb_per_s = kernels::read_bandwidth(weight_bytes);
  mine.memory_gb_per_s = kernels::read_bandwidth(std::size_t{512} << 20);
  const std::string_view bytes(reinterpret_cast<const char*>(&mine), sizeof(mine));
  const auto all = host.all_gather(bytes, deadline);
  if (!all.ok()) return all.status();
  Yardsticks sum;
  for (const std::string& one : *all) {
    Yardsticks theirs;
    CHECK(one.size() == sizeof(theirs), "every rank sends its yardsticks");
    std::memcpy(&theirs, one.data(), sizeof(theirs));
    sum.gemm_flops += theirs.gemm_flops;
    sum.read_gb_per_s += theirs.read_gb_per_s;
    sum.memory_gb_per_s += theirs.memory_gb_per_s;
  }
  return sum;
}

boost::json::object measure(PipelineEngine& engine, const RankRuntime& rank,
                            const std::vector<control::StageInfo>& stages,
                            const Yardsticks& yardsticks) {
  double weight_bytes = 0;
  for (const auto& stage : stages) weight_bytes += static_cast<double>(stage.weight_bytes());
  std::printf(
      "%zu rank(s) at once, one thread each: matrix product %.1f GFLOP/s, reads %.1f GB/s "
      "from buffers of the weights' size, %.1f GB/s from 512 MB\n",
      stages.size(), yardsticks.gemm_flops / 1e9, yardsticks.read_gb_per_s,
      yardsticks.memory_gb_per_s);
  boost::json::object report;
  report["ranks"] = stages.size();
  report["device"] = stages[0].device();
  report["weight_bytes"] = weight_bytes;
  report["gemm_gflops"] = yardsticks.gemm_flops / 1e9;
  report["read_weights_gb_per_s"] = yardsticks.read_gb_per_s;
  report["read_memory_gb_per_s"] = yardsticks.memory_gb_per_s;

  Bench bench(engine, rank.model().vocab_size);
  bench.prefill_rate(1);  // warm up
  boost::json::array rows;
  const double n_ranks = static_cast<double>(stages.size());
  for (const int batch : {1, 8}) {
    const double rate = best_of([&] { return bench.prefill_rate(batch); });
    const double flops = rate * prefill_flops_per_token(rank.model());
    std::printf("prefill  batch %2d  %8.0f tokens/s  %6.1f GFLOP/s", batch, rate, flops / 1e9);
    const double share = yardsticks.gemm_flops > 0 ? flops / yardsticks.gemm_flops : 0;
    if (share > 0) std::printf("  %3.0f %% of the product", 100 * share);
    std::printf("\n");
    rows.push_back({{"phase", "prefill"},
                    {"batch", batch},
                    {"tokens_per_s", rate},
                    {"gflops", flops / 1e9},
                    {"share_of_gemm", share}});
  }
  for (const int batch : {1, 8, 32}) {
    const double rate = best_of([&] { return bench.decode_rate(batch); });
    // Weights are read once for each micro-batch; all stages' micro-batches together make a round.
    const double rounds = rate / batch * std::min<double>(batch, n_ranks);
    const double bytes = rounds * weight_bytes;
    const double share = bytes / 1e9 / yardsticks.read_gb_per_s;
    const double flops = rate * decode_flops_per_token(rank.model());
    std::printf(
        "decode   batch %2d  %8.0f tokens/s  %6.1f GFLOP/s  %5.1f GB/s of weights, %3.0f %% "
        "of the read rate\n",
        batch, rate, flops / 1e9, bytes / 1e9, 100 * share);
    rows.push_back({{"phase", "decode"},
                    {"batch", batch},
                    {"tokens_per_s", rate},
                    {"gflops", flops / 1e9},
                    {"weight_gb_per_s", bytes / 1e9},
                    {"share_of_read", share}});
  }
  report["rows"] = rows;
  return report;
}

int run(int argc, char** argv) {
  std::string model_dir;
  std::string json_file;
  CLI::App app{"Tokens per second of the pipeline"};
  app.add_option("--model", model_dir, "Hugging Face folder")->required();
  app.add_option("--json", json_file, "write the figures to this file");
  CLI11_PARSE(app, argc, argv);

  auto world = comm::MpiWorld::init();
  CHECK(world.ok(), world.status().to_string());
  comm::HostGroup& host = (*world)->host();
  RankSettings settings;
  settings.model_dir = model_dir;
  settings.max_num_seqs = 32;
  settings.kv_bytes = std::uint64_t{1} << 30;
  settings.host_name = (*world)->host_name();
  auto rank = RankRuntime::create(settings, host, (*world)->device());
  const Deadline deadline = Deadline::after_ms(60000);
  const Status agreed = agree_on_outcome(host, rank.status(), deadline);
  if (!agreed.ok()) {
    std::fprintf(stderr, "pipeline_bench: %s\n", agreed.to_string().c_str());
    return 1;
  }
  const auto stages = gather_stages(host, (*rank)->info(), deadline);
  CHECK(stages.ok(), stages.status().to_string());
  const auto yardsticks = measure_yardsticks(host, (*rank)->info().weight_bytes());
  CHECK(yardsticks.ok(), yardsticks.status().to_string());
  std::thread stage_thread([&] {
    const Status ended = (*rank)->worker().run();
    if (!ended.ok()) host.abort(1, ended.to_string());
  });
  if ((*world)->rank() == 0) {
    coordinator::SchedulerConfig config;
    config.max_num_seqs = 32;
    config.max_in_flight = (*world)->size() + 1;
    config.limits.vocab_size = (*rank)->model().vocab_size;
    config.limits.max_model_len = static_cast<std::int32_t>((*rank)->max_model_len());
    config.kv_model = make_kv_model((*rank)->model(), (*rank)->store().shape().dtype,
                                    (*rank)->max_model_len(), *stages);
    PipelineEngine engine(host, config, make_ledger((*rank)->store().shape(), *stages), *stages, {},
                          [&host](const Status& status) { host.abort(1, status.to_string()); });
    engine.start();
    const boost::json::object report = measure(engine, **rank, *stages, *yardsticks);
    engine.stop();
    if (!json_file.empty()) std::ofstream(json_file) << boost::json::serialize(report) << "\n";
  }
  stage_thread.join();
  return 0;
}

}  // namespace
}  // namespace spindle::worker

int main(int argc, char** argv) { return spindle::worker::run(argc, argv); }
