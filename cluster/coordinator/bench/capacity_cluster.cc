#include "cluster/coordinator/bench/capacity_cluster.h"

#include "cluster/coordinator/kv_balance.h"
#include "cluster/coordinator/layer_partition.h"
#include "cluster/coordinator/simulation/seeded_random.h"

namespace spindle::coordinator::bench {
namespace {

constexpr double kWeightBytes = 2;  // of a parameter
// Of a device's memory: what weights and KV may take, beside activations and workspaces.
constexpr double kUsableMemory = 0.9;
constexpr std::int32_t kEos = 2;

simulation::LatencyModel stage_latency(const ModelShape& shape, const DeviceRates& rates,
                                       int n_layers, bool is_last, std::uint64_t page_bytes) {
  simulation::LatencyModel latency;
  const double layers = shape.layer_parameters() * n_layers;
  const double head = is_last ? shape.head_parameters() : 0;
  latency.launch = rates.launch_us;
  latency.weights = (layers + head) * kWeightBytes / rates.read_bytes_per_us;
  latency.token = 2 * layers / rates.flops_per_us;
  latency.logits = 2 * head / rates.flops_per_us;
  latency.kv_page = static_cast<double>(page_bytes) / rates.read_bytes_per_us;
  // Scores and values; of a chunk every token sees half of the chunk on average, which is left out.
  latency.pair = 4.0 * shape.n_heads * shape.head_dim * n_layers / rates.attention_flops_per_us;
  latency.boundary_token = latency.kv_page / 32 * shape.n_kv_heads * n_layers;
  return latency;
}

double memory_share(Memories memories, int stage, int n_stages, simulation::SeededRandom& random) {
  switch (memories) {
    case Memories::kEqual:
      return 1;
    case Memories::kOneThird:
      return stage == n_stages / 2 ? 1.0 / 3 : 1;
    case Memories::kUneven:
      return random.between_real(0.5, 1.0);
  }
  return 1;
}

// As the daemon divides layers: by time, and by what each device can hold.
Result<LayerPartition> divide(const CapacitySettings& settings, std::int64_t kv_bytes_per_token) {
  const ModelShape& shape = settings.shape;
  const double layer_bytes = shape.layer_parameters() * kWeightBytes;
  const double head_bytes = shape.head_parameters() * kWeightBytes;
  PartitionProblem problem;
  problem.layers.assign(static_cast<std::size_t>(shape.n_layers),
                        {.time = layer_bytes,
                         .weight_bytes = static_cast<std::int64_t>(layer_bytes),
                         .kv_bytes_per_token = kv_bytes_per_token});
  problem.embedding.weight_bytes = static_cast<std::int64_t>(head_bytes);
  problem.head = {.time = head_bytes, .weight_bytes = static_cast<std::int64_t>(head_bytes)};
  simulation::SeededRandom random(settings.seed ^ 0x6d656d6fULL);
  for (int s = 0; s < settings.n_stages; ++s) {
    const double share = memory_share(settings.memories, s, settings.n_stages, random);
    problem.devices.push_back(
        {.memory_bytes = static_cast<std::int64_t>(kUsableMemory * share *
                                                   static_cast<double>(settings.memory_bytes))});
  }
  problem.min_kv_tokens = settings.max_model_len;
  return partition_layers(problem);
}

}  // namespace

double ModelShape::layer_parameters() const {
  const double attention =
      static_cast<double>(hidden) * head_dim * (2.0 * n_heads + 2.0 * n_kv_heads);
  return attention + 3.0 * hidden * intermediate;
}

Result<ModelShape> model_shape(std::string_view name) {
  if (name == "8b") return ModelShape{"llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256};
  if (name == "70b") return ModelShape{"llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256};
  return invalid_argument("model: \"" + std::string(name) + "\" is neither 8b nor 70b");
}

// docs/performance.md: copies at 4.27 TB/s, products at 790 TFLOP/s of which layers reach about
// 0.8, prefill attention about 0.6. The links are assumed: 25 GB/s between nodes, and MPI messages
// of 30 us.
DeviceRates h200_rates() {
  return {.read_bytes_per_us = 4.0e6,
          .flops_per_us = 630e6,
          .attention_flops_per_us = 470e6,
          .launch_us = 60,
          .link_bytes_per_us = 25e3,
          .link_us = 15,
          .control_us = 30};
}

std::string_view memories_name(Memories memories) {
  switch (memories) {
    case Memories::kEqual:
      return "equal";
    case Memories::kOneThird:
      return "one-third";
    case Memories::kUneven:
      return "uneven";
  }
  return "";
}

Result<simulation::SimulationConfig> capacity_cluster(const CapacitySettings& settings) {
  const ModelShape& shape = settings.shape;
  simulation::SimulationConfig config;
  config.shape = {.n_kv_heads = shape.n_kv_heads, .head_dim = shape.head_dim};
  const auto partition =
      divide(settings, static_cast<std::int64_t>(config.shape.token_bytes()) * shape.n_kv_heads);
  if (!partition.ok()) return partition.status();
  config.seed = settings.seed;
  config.walks_pages = false;
  config.step_timeout_us = 60'000'000;
  config.tokens = {.vocab_size = shape.vocab_size, .eos = kEos, .eos_every = settings.mean_output};
  config.link.control = settings.rates.control_us;
  config.link.activations = settings.rates.link_us;
  config.link.activations_token = 2.0 * shape.hidden / settings.rates.link_bytes_per_us;
  config.link.jitter = 0.05;
  const std::uint64_t page_bytes = config.shape.page_bytes();
  for (int s = 0; s < settings.n_stages; ++s) {
    const StagePrediction& stage = partition->stages[static_cast<std::size_t>(s)];
    config.stages.push_back(
        {stage.layers.count, stage.kv_bytes / static_cast<std::int64_t>(page_bytes)});
    config.latency.push_back(stage_latency(shape, settings.rates, stage.layers.count,
                                           s + 1 == settings.n_stages, page_bytes));
  }

  SchedulerConfig& scheduler = config.scheduler;
  scheduler.max_num_seqs = settings.max_num_seqs;
  scheduler.max_num_batched_tokens = settings.max_num_batched_tokens;
  scheduler.max_in_flight = settings.n_stages + 1;
  scheduler.max_num_queued_reqs = 1 << 20;
  scheduler.max_num_queued_tokens = std::int64_t{1} << 40;
  scheduler.seed = settings.seed;
  scheduler.eos_token_ids = {kEos};
  scheduler.limits.vocab_size = shape.vocab_size;
  scheduler.limits.max_model_len = static_cast<std::int32_t>(settings.max_model_len);
  scheduler.kv_model = {.n_layers = shape.n_layers,
                        .n_heads = shape.n_heads,
                        .n_kv_heads = shape.n_kv_heads,
                        .head_dim = shape.head_dim,
                        .vocab_size = shape.vocab_size,
                        .max_model_len = settings.max_model_len};
  // Where a token's attention takes as long as the rest of it.
  const double pair = 4.0 * shape.n_heads * shape.head_dim / settings.rates.attention_flops_per_us;
  const double token = 2 * shape.layer_parameters() / settings.rates.flops_per_us;
  scheduler.attention_parity_tokens = static_cast<std::int64_t>(token / pair);
  if (!settings.balances) return config;
  KvBalanceOptions balance;
  balance.typical_tokens = settings.typical_tokens;
  // A tenth of the daemon's defaults: a run is a minute or two.
  balance.warmup_us /= 10;
  balance.cooldown_us /= 10;
  balance.relief_hold_us /= 10;
  balance.smoothing_us /= 10;
  auto made = make_kv_balance(balance, settings.policy, config.scheduler, config.stages);
  if (!made.ok()) return made.status();
  if (!made->has_value()) return invalid_argument("the policy has no levels to balance with");
  config.balance = **std::move(made);
  return config;
}

}  // namespace spindle::coordinator::bench
