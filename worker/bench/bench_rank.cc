#include "worker/bench/bench_rank.h"

#include <utility>

#include "worker/daemon/cluster_start.h"

namespace spindle::worker {

void add_bench_options(CLI::App& app, BenchOptions& options) {
  app.add_option("--model", options.model_dir, "Hugging Face folder")->required();
  app.add_option("--json", options.json_file, "write the figures to this file");
  app.add_option("--device", options.device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_flag("--dummy", options.dummy, "random weights of the shape in config.json");
  app.add_option("--max-num-seqs", options.max_num_seqs, "sequences at the same time");
  app.add_option("--max-num-batched-tokens", options.max_num_batched_tokens, "tokens of a step");
  app.add_option("--max-model-len", options.max_model_len, "longest prompt + output");
  app.add_option("--layers-per-stage", options.layers_per_stage, "one for each rank")
      ->delimiter(',');
  app.add_option_function<std::string>(
      "--kv-policy",
      [&options](const std::string& name) {
        const auto known = kvstore::parse_profile(name);
        if (!known) throw CLI::ValidationError("--kv-policy", "there is no profile " + name);
        options.kv_policy.profile = *known;
      },
      "profile of the requests");
  app.add_option("--kv-ratio", options.kv_policy.ratio, "its share of the KV bytes");
}

Result<BenchRank> start_bench_rank(comm::MpiWorld& world, const BenchOptions& options,
                                   const std::vector<std::int64_t>& kv_bytes) {
  comm::HostGroup& host = world.host();
  RankSettings settings;
  settings.model_dir = options.model_dir;
  settings.dummy_weights = options.dummy;
  settings.max_num_seqs = options.max_num_seqs;
  settings.max_num_batched_tokens = options.max_num_batched_tokens;
  settings.max_model_len = options.max_model_len;
  settings.layers_per_stage = options.layers_per_stage;
  settings.kv_bytes = kv_bytes;
  settings.device = options.on_gpu() ? ComputeDevice::kCuda : ComputeDevice::kCpu;
  settings.host_name = world.host_name();
  settings.local_rank = world.local_rank();
  settings.ranks_on_host = world.local_size();
  world.set_waiting(choose_waiting(settings));
  auto recorder = std::make_unique<StepRecorder>();
  settings.worker.recorder = recorder.get();
  const Deadline deadline = Deadline::after_ms(300000);
  const auto topology = agree_on_topology(settings, host, deadline);
  if (!topology.ok()) return topology.status();
  auto runtime = RankRuntime::create(settings, *topology, host, world.device());
  const Status agreed = agree_on_outcome(host, runtime.status(), deadline);
  if (!agreed.ok()) return agreed;
  auto stages = gather_stages(host, (*runtime)->info(), deadline);
  if (!stages.ok()) return stages.status();
  return BenchRank{std::move(recorder), std::move(*runtime), std::move(*stages)};
}

int bench_micro_batches(const std::vector<control::StageInfo>& stages) {
  return static_cast<int>(stages.size()) + 1;
}

coordinator::SchedulerConfig bench_scheduler_config(const BenchRank& rank,
                                                    const BenchOptions& options) {
  const RankRuntime& runtime = *rank.runtime;
  coordinator::SchedulerConfig config;
  config.max_num_seqs = options.max_num_seqs;
  config.max_num_batched_tokens = options.max_num_batched_tokens;
  config.max_in_flight = bench_micro_batches(rank.stages);
  config.limits.vocab_size = runtime.model().vocab_size;
  config.limits.max_model_len = static_cast<std::int32_t>(runtime.max_model_len());
  config.kv_model = make_kv_model(runtime.model(), runtime.store().shape().dtype,
                                  runtime.max_model_len(), rank.stages);
  return config;
}

}  // namespace spindle::worker
