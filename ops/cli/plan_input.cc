#include "ops/cli/plan_input.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <utility>

#include "worker/config/cluster_settings.h"
#include "worker/config/config_loader.h"
#include "worker/config/config_override.h"
#include "worker/config/config_rules.h"
#include "worker/config/kv_policy.h"
#include "worker/config/profile_table.h"
#include "worker/model/model_config.h"
#include "worker/model/model_shape.h"

namespace spindle::cli {
namespace {

constexpr std::uint64_t kMostMemory = 1ULL << 49;
constexpr int kMostDevices = 1024;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 30;

struct FieldFlag {
  const char* flags;
  const char* path;
  const char* type;
  const char* help;
};
constexpr auto kFieldFlags = std::to_array<FieldFlag>({
    {"--model", "model.path", "FOLDER", "Folder with the model's config.json"},
    {"--load-format", "model.load_format", "FORMAT", "safetensors, or dummy: 16-bit weights"},
    {"--profile,--kv-policy", "kv.policy.profile", "PROFILE", "How KV is compressed"},
    {"--ratio,--kv-ratio", "kv.policy.ratio", "SHARE", "KV bytes kept, of the uncompressed ones"},
    {"--profile-table", "kv.profile_table", "FILE", "The model's calibrated table"},
    {"--dtype,--kv-cache-dtype", "kv.dtype", "DTYPE", "Of KV: auto, float16, bfloat16 or float32"},
    {"--max-model-len", "model.max_model_len", "TOKENS", "Longest prompt + output served"},
    {"--max-num-seqs", "scheduler.max_num_seqs", "N", "Sequences that run at the same time"},
    {"--max-num-batched-tokens", "scheduler.max_num_batched_tokens", "TOKENS", "Of a step"},
    {"--layers-per-stage", "cluster.layers_per_stage", "N,N,...", "Instead of the planned split"},
    {"--device", "compute.device", "DEVICE", "cuda or cpu"},
    {"--gpu-memory-utilization", "compute.gpu_memory_utilization", "SHARE",
     "Of a GPU's memory that may be used"},
});

// Complete and valid, or what is wrong with it.
Result<config::Config> completed(config::Config config) {
  std::error_code error;
  config::make_paths_absolute(config, std::filesystem::current_path(error));
  config::fill_defaults(config);
  if (const Status status = config::validate_config(config); !status.ok()) return status;
  return config;
}

Result<config::Config> read_config(const PlanOptions& options) {
  config::Config config;
  if (!options.config.empty()) {
    auto loaded = config::load_config_file(options.config);
    if (!loaded.ok()) return loaded.status().with_context("--config");
    config = std::move(*loaded);
  }
  for (std::size_t i = 0; i < kFieldFlags.size(); ++i) {
    const FieldFlag& flag = kFieldFlags[i];
    const std::string& value = options.fields[i];
    if (value.empty()) continue;
    const std::string name = std::string(flag.flags).substr(0, std::string(flag.flags).find(','));
    const std::string context = name + " " + value;
    Status status =
        config::apply_override(config, flag.path, config::schema_value(flag.path, value));
    if (!status.ok()) return status.with_context(context);
    // A value out of range is named by its flag; what the file lacks is not this flag's fault.
    if (config.model().path().empty()) continue;
    if (status = completed(config).status(); !status.ok()) return status.with_context(context);
  }
  for (const std::string& assignment : options.set) {
    const Status status = config::apply_assignment(config, assignment);
    if (!status.ok()) return status.with_context("--set " + assignment);
  }
  if (config.model().path().empty()) {
    return invalid_argument("say which model: --model FOLDER, or --config FILE");
  }
  return completed(std::move(config));
}

std::optional<double> parse_number(std::string_view text, std::string_view& unit) {
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || !std::isfinite(number)) return std::nullopt;
  unit = text.substr(static_cast<std::size_t>(end - text.data()));
  while (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  return number;
}

Result<std::uint64_t> parse_bandwidth(const std::string& text) {
  std::string_view unit;
  const auto number = parse_number(text, unit);
  const bool is_gb = unit.empty() || unit == "GB/s";
  if (!number || !is_gb || !(*number >= 0.001 && *number <= 1e6)) {
    return invalid_argument("--device-bandwidth " + text +
                            ": give GB/s of each device's memory, from 0.001 to 1000000");
  }
  return static_cast<std::uint64_t>(*number * 1e9);
}

// As many values as devices: one is for all.
template <typename T>
Status spread(const char* flag, std::size_t n, std::vector<T>& values) {
  if (values.size() == 1) values.resize(n, values.front());
  if (values.empty() || values.size() == n) return ok_status();
  return invalid_argument(std::string(flag) + " has " + std::to_string(values.size()) +
                          " entries for " + std::to_string(n) +
                          " devices; give one for all or one for each");
}

Result<std::size_t> count_devices(const PlanOptions& options,
                                  const coordinator::ClusterSettings& settings) {
  if (options.n_devices) return static_cast<std::size_t>(*options.n_devices);
  for (const std::size_t n : {options.device_memory.size(), options.device_bandwidth.size(),
                              settings.layers_per_stage.size(), settings.device_memory_bytes.size(),
                              settings.kv_bytes.size()}) {
    if (n > static_cast<std::size_t>(kMostDevices)) {
      return invalid_argument(std::to_string(n) + " devices; at most " +
                              std::to_string(kMostDevices));
    }
    if (n > 1) return n;
  }
  if (options.device_memory.size() == 1) return std::size_t{1};
  return invalid_argument("say how many devices there are: --gpus N (--ranks N on CPUs)");
}

Status set_devices(const PlanOptions& options, coordinator::ClusterDescription& cluster) {
  const bool on_gpu = cluster.settings.device == coordinator::ComputeDevice::kCuda;
  const auto n = count_devices(options, cluster.settings);
  if (!n.ok()) return n.status();
  std::vector<std::uint64_t> memory;
  const std::string& each = options.gpu_memory;
  if (!each.empty() && !options.device_memory.empty()) {
    return invalid_argument("give either --gpu-memory or --device-memory");
  }
  if (!each.empty() && !on_gpu) {
    return invalid_argument("--gpu-memory " + each + " with --device cpu; use --device-memory");
  }
  for (const std::string& text : each.empty() ? options.device_memory : std::vector{each}) {
    const auto bytes = parse_memory(each.empty() ? "--device-memory" : "--gpu-memory", text);
    if (!bytes.ok()) return bytes.status();
    memory.push_back(*bytes);
  }
  std::vector<std::uint64_t> speeds;
  for (const std::string& text : options.device_bandwidth) {
    const auto speed = parse_bandwidth(text);
    if (!speed.ok()) return speed.status();
    speeds.push_back(*speed);
  }
  Status status = spread("--device-memory", *n, memory);
  if (status.ok()) status = spread("--device-bandwidth", *n, speeds);
  if (!status.ok()) return status;
  if (!on_gpu && !memory.empty()) {
    cluster.settings.device_memory_bytes.assign(memory.begin(), memory.end());
    memory.clear();
  }
  const bool is_stated =
      !cluster.settings.device_memory_bytes.empty() || !cluster.settings.kv_bytes.empty();
  if (on_gpu && memory.empty() && !is_stated) {
    return invalid_argument("say what memory a GPU has: --gpu-memory 80GiB");
  }
  for (std::size_t i = 0; i < *n; ++i) {
    cluster.devices.push_back({.id = std::to_string(i),
                               .total_bytes = memory.empty() ? 0 : memory[i],
                               .speed = speeds.empty() ? 0 : speeds[i]});
  }
  return ok_status();
}

}  // namespace

void add_plan_options(CLI::App& app, PlanOptions& options) {
  const CLI::Range tokens(std::int64_t{1}, kMostTokens);
  app.add_option("--config", options.config, "A configuration of spindled; flags change it")
      ->type_name("FILE");
  app.add_option("--set", options.set, "Change one field of the configuration; repeatable")
      ->type_name("FIELD=VALUE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--gpus,--ranks", options.n_devices, "Devices, a pipeline stage on each")
      ->check(CLI::Range(1, kMostDevices))
      ->group("Devices");
  app.add_option("--gpu-memory", options.gpu_memory, "Of each GPU, e.g. 80GiB")
      ->type_name("SIZE")
      ->group("Devices");
  app.add_option("--device-memory", options.device_memory, "Of each device: 80GiB,80GiB,24GiB")
      ->type_name("SIZE,SIZE,...")
      ->delimiter(',')
      ->group("Devices");
  app.add_option("--device-bandwidth", options.device_bandwidth,
                 "Peak rate of each device's memory in GB/s; without it all count as equal")
      ->type_name("RATE,RATE,...")
      ->delimiter(',')
      ->group("Devices");
  app.add_option("--context", options.context, "Tokens of a request's prompt")
      ->required()
      ->check(tokens)
      ->group("Requests");
  app.add_option("--output", options.output, "Tokens of its output")
      ->capture_default_str()
      ->check(tokens)
      ->group("Requests");
  app.add_option("--concurrency", options.concurrency,
                 "Whether so many run at once, and if not, what would let them")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24))
      ->group("Requests");
  options.fields.resize(kFieldFlags.size());
  for (std::size_t i = 0; i < kFieldFlags.size(); ++i) {
    const FieldFlag& flag = kFieldFlags[i];
    app.add_option(flag.flags, options.fields[i], std::string(flag.help) + " [" + flag.path + "]")
        ->type_name(flag.type);
  }
  app.add_flag("--json", options.json, "One JSON object, sizes in bytes");
}

Result<std::uint64_t> parse_memory(std::string_view flag, std::string_view text) {
  constexpr auto kUnits =
      std::to_array<std::pair<std::string_view, double>>({{"", 1},
                                                          {"B", 1},
                                                          {"KB", 1e3},
                                                          {"MB", 1e6},
                                                          {"GB", 1e9},
                                                          {"TB", 1e12},
                                                          {"KiB", 1024.0},
                                                          {"MiB", 1048576.0},
                                                          {"GiB", 1073741824.0},
                                                          {"TiB", 1099511627776.0}});
  std::string_view unit;
  const auto number = parse_number(text, unit);
  const auto* const found =
      std::find_if(kUnits.begin(), kUnits.end(), [&](const auto& u) { return u.first == unit; });
  const double bytes = number && found != kUnits.end() ? *number * found->second : 0;
  if (!(bytes >= 1 && bytes <= static_cast<double>(kMostMemory))) {
    return invalid_argument(std::string(flag) + " \"" + std::string(text) +
                            "\" must be a size such as 80GiB or 24GB, of at most 512 TiB");
  }
  return static_cast<std::uint64_t>(bytes);
}

Result<PlanQuestion> read_plan_question(const PlanOptions& options) {
  const auto config = read_config(options);
  if (!config.ok()) return config.status();
  const auto model = model::load_model_config(config->model().path());
  if (!model.ok()) return model.status();
  const auto n_weights = model::count_weights(*model);
  if (!n_weights.ok()) return n_weights.status();
  PlanQuestion question;
  question.model_name = config->model().served_model_name();
  question.n_weights = *n_weights;
  question.cluster.model =
      model::model_shape(*model, config->model().load_format() == config::Model::DUMMY);
  question.checkpoint_bytes =
      static_cast<std::uint64_t>(*n_weights) * (question.cluster.model.has_f32_weights ? 4 : 2);
  question.cluster.settings = config::cluster_settings(*config);
  if (config->compute().device() == config::Compute::AUTO) {
    question.cluster.settings.device = coordinator::ComputeDevice::kCuda;
  }
  if (Status status = set_devices(options, question.cluster); !status.ok()) return status;
  question.kind.prompt_tokens = options.context;
  question.kind.output_tokens = options.output;
  auto policy = config::to_kv_policy(config->kv().policy());
  if (!policy.ok()) return policy.status();
  question.kind.policy = std::move(*policy);
  question.kind.policy.best_effort = true;  // a default is nobody's wish
  if (!config->kv().profile_table().empty()) {
    auto table = config::load_profile_table(config->kv().profile_table(), model->n_layers,
                                            model->n_kv_heads);
    if (!table.ok()) return table.status();
    question.table = std::move(*table);
  }
  return question;
}

}  // namespace spindle::cli
