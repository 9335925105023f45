// Tokens per second of the whole pipeline, beside the machine's own rates in the same run.
//
//   mpirun -n 2 --bind-to none build/bin/pipeline_bench --model models/spindle-mini [--json FILE]
//   build/bin/pipeline_bench --device cuda --dummy --model models/shapes/llama-3-8b
//       --decode-batches 1,16 --decode-prompt 32768 --max-model-len 33024 --kv-policy spindle
//
// Every rank takes part; rank 0 submits requests to the real engine, without sockets and text.
// Prefill is held against the rate of a library's matrix product, decode against the rate at which
// one thread reads memory: a decode step must at least read the weights once. The mixed rows say
// how busy the stages are while some requests decode and prompts come one after the other.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <boost/json.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cluster/comm/mpi_world.h"
#include "kernels/bench/yardsticks.h"
#include "worker/bench/bench_rank.h"
#include "worker/bench/bench_trace.h"
#include "worker/bench/device_rates.h"
#include "worker/daemon/cluster_start.h"
#include "worker/daemon/rank_runtime.h"
#include "worker/engine/pipeline_engine.h"
#include "worker/model/llama_weights.h"
#include "worker/orders/order_channel.h"

namespace spindle::worker {
namespace {

using Clock = std::chrono::steady_clock;

// What to measure.
struct Options : BenchOptions {
  std::uint64_t kv_bytes = std::uint64_t{1} << 30;
  int prefill_tokens = 2048;
  int decode_prompt = 128;
  int decode_tokens = 96;
  std::vector<int> prefill_batches = {1, 8};
  std::vector<int> decode_batches = {1, 8, 32};
  std::vector<int> mixed_batches = {16};
  int mixed_prompts = 16;
  int repeats = 3;  // of which the best counts
  bool recording = false;
  std::string trace_file;
};

constexpr std::chrono::milliseconds kTraceDuration{500};

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
    if (!status.ok() && status.code() != StatusCode::kCancelled) {
      std::fprintf(stderr, "a request failed: %s\n", status.to_string().c_str());
    }
    ended_ = true;
    changed_.notify_all();
  }
  bool wait() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::minutes(10), [this] { return ended_; });
  }
  std::size_t n_tokens() const {
    const std::lock_guard lock(mutex_);
    return times_.size();
  }
  bool has_ended() const {
    const std::lock_guard lock(mutex_);
    return ended_;
  }
  const std::vector<Clock::time_point>& times() const { return times_; }

 private:
  mutable std::mutex mutex_;
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

// Computing time of every stage so far.
struct BusyTime {
  Clock::time_point at;
  std::vector<double> seconds;
};

BusyTime busy_time(const PipelineEngine& engine) {
  BusyTime out{.at = Clock::now(), .seconds = {}};
  for (const engine::StageState& stage : engine.stats().stages) {
    out.seconds.push_back(stage.busy_seconds);
  }
  return out;
}

std::vector<double> busy_shares(const BusyTime& from, const BusyTime& to) {
  std::vector<double> shares;
  for (std::size_t s = 0; s < from.seconds.size(); ++s) {
    shares.push_back((to.seconds[s] - from.seconds[s]) / seconds_between(from.at, to.at));
  }
  return shares;
}

std::string percents(const std::vector<double>& shares) {
  std::string out;
  for (const double share : shares) {
    out += (out.empty() ? "" : ", ") + fmt::format("{:.1f}", 100 * share);
  }
  return out;
}

class Bench {
 public:
  Bench(PipelineEngine& engine, int vocab_size, const Options& options)
      : engine_(engine), vocab_size_(vocab_size), options_(options) {}

  // Prompt tokens per second when `batch` prompts of prefill_tokens come at once.
  double prefill_rate(int batch) {
    const Clock::time_point start = Clock::now();
    run(batch, options_.prefill_tokens, 1);
    return batch * options_.prefill_tokens / seconds_between(start, Clock::now());
  }

  // What happened while all `batch` requests decoded, and nothing else ran: from the last one's
  // second token on, since the boundary of its prompt comes after its first.
  struct Decoding {
    double tokens_per_s = 0;
    std::vector<double> busy_shares;  // of each stage
  };
  // `meanwhile` is called then, and may take a part of that time.
  Decoding decode(int batch, const std::function<void()>& meanwhile = {}) {
    const Sinks sinks = submit(batch, options_.decode_prompt, options_.decode_tokens);
    wait_for([&] {
      return std::ranges::all_of(sinks, [](const auto& sink) { return sink->n_tokens() > 1; });
    });
    const BusyTime before = busy_time(engine_);
    if (meanwhile) meanwhile();
    const auto nearly_all = static_cast<std::size_t>(options_.decode_tokens - 2);
    wait_for([&] {
      return std::ranges::any_of(sinks,
                                 [&](const auto& sink) { return sink->n_tokens() > nearly_all; });
    });
    Decoding out{.busy_shares = busy_shares(before, busy_time(engine_))};
    wait_ended(sinks);
    Clock::time_point from = Clock::time_point::min();
    Clock::time_point to = Clock::time_point::max();
    for (const auto& sink : sinks) {
      from = std::max(from, sink->times()[1]);
      to = std::min(to, sink->times().back());
    }
    std::int64_t n_tokens = 0;
    for (const auto& sink : sinks) {
      n_tokens += std::count_if(sink->times().begin(), sink->times().end(),
                                [&](Clock::time_point t) { return t > from && t <= to; });
    }
    out.tokens_per_s = static_cast<double>(n_tokens) / seconds_between(from, to);
    return out;
  }

  // What the stages did while `batch` requests decoded and prompts came one after the other, two at
  // a time for each stage, so that no stage lacks one.
  struct Mixed {
    double prompt_tokens_per_s = 0;
    double generated_tokens_per_s = 0;
    std::vector<double> busy_shares;
  };
  Mixed mixed(int batch) {
    const int room = static_cast<int>(engine_.limits().max_model_len) - options_.decode_prompt;
    const Sinks decoding = submit(batch, options_.decode_prompt, room);
    wait_for([&] {
      return std::ranges::all_of(decoding, [](const auto& sink) { return sink->n_tokens() > 0; });
    });
    const int n_at_once = 2 * static_cast<int>(engine_.stats().stages.size());
    Sinks prompts = submit(n_at_once, options_.prefill_tokens, 1);
    std::size_t next = 0;
    const auto replace = [&](int n) {
      for (int i = 0; i < n; ++i) {
        CHECK(prompts[next++]->wait(), "a prompt takes more than ten minutes");
        prompts.push_back(submit(1, options_.prefill_tokens, 1).front());
      }
    };
    replace(n_at_once);  // until all stages have work
    const engine::EngineStats counts_before = engine_.stats();
    const BusyTime before = busy_time(engine_);
    replace(options_.mixed_prompts);
    const BusyTime after = busy_time(engine_);
    const engine::EngineStats counts = engine_.stats();
    const bool still_decoding =
        std::ranges::none_of(decoding, [](const auto& sink) { return sink->has_ended(); });
    CHECK(still_decoding, "the model's context is too short for so many prompts");
    for (const engine::RequestHandle handle : std::exchange(handles_, {})) engine_.cancel(handle);
    wait_ended(decoding);
    wait_ended(prompts);
    const double seconds = seconds_between(before.at, after.at);
    return {
        static_cast<double>(counts.prompt_tokens - counts_before.prompt_tokens) / seconds,
        static_cast<double>(counts.generation_tokens - counts_before.generation_tokens) / seconds,
        busy_shares(before, after)};
  }

 private:
  using Sinks = std::vector<std::shared_ptr<TimingSink>>;

  Sinks run(int batch, int n_prompt, int n_output) {
    Sinks sinks = submit(batch, n_prompt, n_output);
    wait_ended(sinks);
    return sinks;
  }

  static void wait_ended(const Sinks& sinks) {
    for (const auto& sink : sinks) CHECK(sink->wait(), "a request takes more than ten minutes");
  }

  template <typename Condition>
  static void wait_for(Condition&& holds) {
    const Clock::time_point deadline = Clock::now() + std::chrono::minutes(10);
    while (!holds()) {
      CHECK(Clock::now() < deadline, "requests take more than ten minutes");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  Sinks submit(int batch, int n_prompt, int n_output) {
    Sinks sinks;
    for (int i = 0; i < batch; ++i) {
      engine::EngineRequest request;
      request.prompt_ids = random_prompt(n_prompt, vocab_size_, random_);
      request.sampling.temperature = 0;
      request.sampling.max_tokens = n_output;
      request.sampling.ignore_eos = true;
      if (n_output > 1) {
        request.kv_policy = options_.kv_policy;
      }
      sinks.push_back(std::make_shared<TimingSink>());
      const auto handle = engine_.submit(std::move(request), sinks.back());
      CHECK(handle.ok(), handle.status().to_string());
      handles_.push_back(*handle);
    }
    return sinks;
  }

  PipelineEngine& engine_;
  int vocab_size_;
  const Options& options_;
  std::vector<engine::RequestHandle> handles_;
  std::mt19937 random_{20261121};
};

// The run with the highest rate.
template <typename Measure, typename Rate>
auto best_of(int repeats, Measure&& measure, Rate&& rate) {
  auto best = measure();
  for (int i = 1; i < repeats; ++i) {
    auto next = measure();
    if (rate(next) > rate(best)) best = std::move(next);
  }
  return best;
}

// Decode rates with the recorders off and on, the best of each, measured in turn.
std::pair<double, double> recording_cost(Bench& bench, OrderClient& client, int batch,
                                         int repeats) {
  double off = 0;
  double on = 0;
  for (int i = 0; i < repeats; ++i) {
    off = std::max(off, bench.decode(batch).tokens_per_s);
    turn_recording(client, true);
    on = std::max(on, bench.decode(batch).tokens_per_s);
    turn_recording(client, false);
  }
  return {off, on};
}

// Multiplications and additions of one prompt token's linear layers and of its attention over half
// of the prompt, without the head (one row a prompt).
double prefill_flops_per_token(const model::ModelConfig& m, int n_tokens) {
  const double linear =
      2.0 * m.n_layers * m.hidden_size *
      (m.head_dim * (2.0 * m.n_heads + 2.0 * m.n_kv_heads) + 3.0 * m.intermediate_size);
  const double attention = 4.0 * m.n_layers * m.n_heads * m.head_dim * (n_tokens / 2.0);
  return linear + attention;
}

// The same for a generated token: with the head, and attention over the whole context.
double decode_flops_per_token(const model::ModelConfig& m, double n_context) {
  const double linear =
      2.0 * m.n_layers * m.hidden_size *
          (m.head_dim * (2.0 * m.n_heads + 2.0 * m.n_kv_heads) + 3.0 * m.intermediate_size) +
      2.0 * m.hidden_size * m.vocab_size;
  const double attention = 4.0 * m.n_layers * m.n_heads * m.head_dim * n_context;
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

// What a rate is held against: the CPU's or the GPU's.
struct Limits {
  double flops_per_second = 0;  // 0: nothing to compare with
  double bytes_per_second = 0;
};

boost::json::object measure(PipelineEngine& engine, const RankRuntime& rank,
                            const std::vector<control::StageInfo>& stages, const Limits& limits,
                            const Options& options, OrderClient& orders) {
  double weight_bytes = 0;
  for (const auto& stage : stages) weight_bytes += static_cast<double>(stage.weight_bytes());
  const model::ModelConfig& m = rank.model();
  // What a decode step does not read: the embedding table.
  const double table_bytes = m.tie_word_embeddings ? 0.0 : 2.0 * m.vocab_size * m.hidden_size;
  const double step_weight_bytes = weight_bytes - (options.on_gpu() ? table_bytes : 0.0);
  const double kv_token_bytes = 4.0 * m.n_layers * m.n_kv_heads * m.head_dim;
  boost::json::object report;
  report["name"] = "pipeline";
  report["model"] = options.model_dir;
  report["ranks"] = stages.size();
  report["device"] = stages[0].device();
  report["weight_bytes"] = weight_bytes;
  report["gemm_gflops"] = limits.flops_per_second / 1e9;
  report["read_gb_per_s"] = limits.bytes_per_second / 1e9;
  report["kv_policy"] = std::string(kvstore::profile_name(options.kv_policy.profile));
  report["kv_ratio"] = options.kv_policy.ratio;

  Bench bench(engine, m.vocab_size, options);
  bench.prefill_rate(1);  // warm up
  boost::json::array rows;
  const double n_ranks = static_cast<double>(stages.size());
  for (const int batch : options.prefill_batches) {
    if (batch <= 0) continue;
    const double rate = best_of(
        options.repeats, [&] { return bench.prefill_rate(batch); }, [](double r) { return r; });
    const double flops = rate * prefill_flops_per_token(m, options.prefill_tokens);
    std::printf("prefill  batch %2d of %d  %8.0f tokens/s  %9.1f GFLOP/s", batch,
                options.prefill_tokens, rate, flops / 1e9);
    const double share = limits.flops_per_second > 0 ? flops / limits.flops_per_second : 0;
    if (share > 0) std::printf("  %3.0f %% of the product", 100 * share);
    std::printf("\n");
    rows.push_back({{"phase", "prefill"},
                    {"batch", batch},
                    {"tokens", options.prefill_tokens},
                    {"tokens_per_s", rate},
                    {"gflops", flops / 1e9},
                    {"share_of_gemm", share}});
  }
  const double n_context = options.decode_prompt + options.decode_tokens / 2.0;
  for (const int batch : options.decode_batches) {
    if (batch <= 0) continue;
    const Bench::Decoding decoding = best_of(
        options.repeats, [&] { return bench.decode(batch); },
        [](const Bench::Decoding& d) { return d.tokens_per_s; });
    const double rate = decoding.tokens_per_s;
    // Weights are read once for each micro-batch; all stages' micro-batches together make a round.
    const double rounds = rate / batch * std::min<double>(batch, n_ranks);
    const double weight_rate = rounds * step_weight_bytes;
    // Of the uncompressed cache; with another policy it is what `full` would have read.
    const double kv_rate = rate * n_context * kv_token_bytes;
    const bool is_full = options.kv_policy.profile == kvstore::KvProfile::kFull;
    const double share = (weight_rate + (is_full ? kv_rate : 0)) / limits.bytes_per_second;
    const double flops = rate * decode_flops_per_token(m, n_context);
    std::printf(
        "decode   batch %2d at %.0f tokens, %s  %8.1f tokens/s, %7.3f ms a round  %5.1f GB/s of "
        "weights, %5.1f GB/s of uncompressed KV, %3.0f %% of the %s, stages busy %s %%\n",
        batch, n_context, std::string(kvstore::profile_name(options.kv_policy.profile)).c_str(),
        rate, 1e3 * batch / rate, weight_rate / 1e9, kv_rate / 1e9, 100 * share,
        options.on_gpu() ? "copy rate" : "read rate", percents(decoding.busy_shares).c_str());
    rows.push_back({{"phase", "decode"},
                    {"batch", batch},
                    {"context", n_context},
                    {"tokens_per_s", rate},
                    {"ms_per_round", 1e3 * batch / rate},
                    {"gflops", flops / 1e9},
                    {"weight_gb_per_s", weight_rate / 1e9},
                    {"full_kv_gb_per_s", kv_rate / 1e9},
                    {"share_of_read", share},
                    {"busy_shares", boost::json::value_from(decoding.busy_shares)}});
    if (!options.trace_file.empty()) {
      bench.decode(batch, [&] {
        const Status written = write_trace(orders, stages, kTraceDuration, options.trace_file);
        CHECK(written.ok(), written.to_string());
      });
    }
    if (options.recording) {
      const auto [off, on] = recording_cost(bench, orders, batch, options.repeats);
      std::printf("decode   batch %2d, recorders off %8.1f, on %8.1f tokens/s: ratio %.4f\n", batch,
                  off, on, on / off);
      rows.push_back({{"phase", "recording"},
                      {"batch", batch},
                      {"off_tokens_per_s", off},
                      {"on_tokens_per_s", on},
                      {"ratio", on / off}});
    }
    std::fflush(stdout);
  }
  for (const int batch : options.mixed_batches) {
    if (batch <= 0) continue;
    const Bench::Mixed mixed = bench.mixed(batch);
    std::printf(
        "mixed    batch %2d decoding beside prompts of %d  %8.0f prompt tokens/s, %8.1f tokens/s, "
        "stages busy %s %%\n",
        batch, options.prefill_tokens, mixed.prompt_tokens_per_s, mixed.generated_tokens_per_s,
        percents(mixed.busy_shares).c_str());
    rows.push_back({{"phase", "mixed"},
                    {"batch", batch},
                    {"tokens", options.prefill_tokens},
                    {"prompt_tokens_per_s", mixed.prompt_tokens_per_s},
                    {"tokens_per_s", mixed.generated_tokens_per_s},
                    {"busy_shares", boost::json::value_from(mixed.busy_shares)}});
  }
  report["rows"] = rows;
  return report;
}

Options parse(int argc, char** argv, CLI::App& app) {
  Options options;
  add_bench_options(app, options);
  app.add_option("--kv-bytes", options.kv_bytes, "KV pool of a rank; 0: what is left on a GPU");
  app.add_option("--prefill-tokens", options.prefill_tokens, "prompt of the prefill rows");
  app.add_option("--prefill-batches", options.prefill_batches, "prompts at once; 0: not measured")
      ->delimiter(',');
  app.add_option("--decode-prompt", options.decode_prompt, "prompt of the decode rows");
  app.add_option("--decode-tokens", options.decode_tokens, "output of the decode rows")
      ->check(CLI::Range(4, 1 << 30));
  app.add_option("--decode-batches", options.decode_batches, "requests at once; 0: not measured")
      ->delimiter(',');
  app.add_option("--mixed-batches", options.mixed_batches,
                 "requests that decode beside prompts; 0: not measured")
      ->delimiter(',');
  app.add_option("--mixed-prompts", options.mixed_prompts, "prompts of a mixed row")
      ->check(CLI::PositiveNumber);
  app.add_option("--repeats", options.repeats, "runs of a row, of which the best counts")
      ->check(CLI::PositiveNumber);
  app.add_flag("--recording", options.recording,
               "decode rows also with the recorders on, in turn with runs with them off");
  app.add_option("--trace", options.trace_file,
                 "one more decode row, of which half a second goes to this file as a Chrome trace; "
                 "of several batches the last stays");
  app.parse(argc, argv);
  return options;
}

int run(int argc, char** argv) {
  CLI::App app{"Tokens per second of the pipeline"};
  Options options;
  try {
    options = parse(argc, argv, app);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  auto world = comm::MpiWorld::init();
  CHECK(world.ok(), world.status().to_string());
  comm::HostGroup& host = (*world)->host();
  Limits limits;
  if (options.on_gpu()) {
    const auto rates = measure_device_rates((*world)->local_rank());
    if (rates) {
      limits.flops_per_second = rates->gemm_flops_per_second * host.size();
      limits.bytes_per_second = rates->copy_bytes_per_second * host.size();
    }
  }
  std::vector<std::int64_t> kv_bytes;
  if (options.kv_bytes > 0) kv_bytes = {static_cast<std::int64_t>(options.kv_bytes)};
  auto started = start_bench_rank(**world, options, kv_bytes);
  if (!started.ok()) {
    std::fprintf(stderr, "pipeline_bench: %s\n", started.status().to_string().c_str());
    return 1;
  }
  RankRuntime& rank = *started->runtime;
  const std::vector<control::StageInfo>& stages = started->stages;
  if (!options.on_gpu()) {
    const auto yardsticks = measure_yardsticks(host, rank.info().weight_bytes());
    CHECK(yardsticks.ok(), yardsticks.status().to_string());
    limits = {yardsticks->gemm_flops, yardsticks->read_gb_per_s * 1e9};
    if (host.rank() == 0) {
      std::printf(
          "%d rank(s) at once, one thread each: matrix product %.1f GFLOP/s, reads %.1f GB/s "
          "from buffers of the weights' size, %.1f GB/s from 512 MB\n",
          host.size(), yardsticks->gemm_flops / 1e9, yardsticks->read_gb_per_s,
          yardsticks->memory_gb_per_s);
    }
  }
  std::optional<OrderServer> orders;
  if (host.rank() != 0) orders.emplace(host, recorder_orders(*started->recorder));
  std::thread stage_thread([&] {
    const Status ended = rank.worker().run();
    if (!ended.ok()) host.abort(1, ended.to_string());
  });
  if ((*world)->rank() == 0) {
    const coordinator::SchedulerConfig config = bench_scheduler_config(*started, options);
    PipelineEngineOptions engine_options;
    engine_options.recorder = started->recorder.get();
    OrderClient client(host, recorder_orders(*started->recorder));
    PipelineEngine engine(host, config, make_ledger(rank.store().shape(), stages), stages,
                          engine_options,
                          [&host](const Status& status) { host.abort(1, status.to_string()); });
    engine.start();
    const boost::json::object report = measure(engine, rank, stages, limits, options, client);
    engine.stop();
    if (!options.json_file.empty()) {
      std::ofstream(options.json_file) << boost::json::serialize(report) << "\n";
    }
  }
  stage_thread.join();
  return 0;
}

}  // namespace
}  // namespace spindle::worker

int main(int argc, char** argv) { return spindle::worker::run(argc, argv); }
