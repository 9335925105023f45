#include "worker/config/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <utility>
#include <vector>

#include "cluster/api/framing.h"
#include "kernels/core/build_info.h"
#include "kernels/core/cli_tree.h"
#include "worker/config/config_loader.h"
#include "worker/config/config_override.h"
#include "worker/config/config_rules.h"

namespace spindle::config {
namespace {

// A flag that is another name for one field.
struct FieldFlag {
  const char* flag;
  const char* path;
  const char* value_name;
  const char* help;
};

constexpr auto kFieldFlags = std::to_array<FieldFlag>({
    {"--model", "model.path", "FOLDER", "Hugging Face folder with the model"},
    {"--load-format", "model.load_format", "FORMAT", "safetensors or dummy (random weights)"},
    {"--served-model-name", "model.served_model_name", "NAME", "model id that clients send"},
    {"--max-model-len", "model.max_model_len", "TOKENS", "longest prompt + output"},
    {"--host", "api.http.host", "ADDRESS", "HTTP listener (the TCP API's is api.tcp.host)"},
    {"--port", "api.http.port", "PORT", "HTTP port (the TCP API's is api.tcp.port)"},
    {"--metrics-compat", "api.http.metrics_compat", "NAMES",
     "none, or vllm: /metrics uses vLLM's names too where it has equals"},
    {"--max-num-seqs", "scheduler.max_num_seqs", "N", "sequences that run at the same time"},
    {"--max-num-batched-tokens", "scheduler.max_num_batched_tokens", "TOKENS", "tokens of a step"},
    {"--max-num-queued-reqs", "scheduler.max_num_queued_reqs", "N", "requests that may wait"},
    {"--max-num-queued-tokens", "scheduler.max_num_queued_tokens", "TOKENS",
     "prompt tokens that may wait"},
    {"--kv-cache-dtype", "kv.dtype", "DTYPE", "auto, float16, bfloat16 or float32"},
    {"--kv-policy", "kv.policy.profile", "PROFILE", "how KV is compressed: full, spindle, ..."},
    {"--kv-ratio", "kv.policy.ratio", "SHARE", "KV bytes kept, of the uncompressed ones"},
    {"--device", "compute.device", "DEVICE", "auto, cpu or cuda"},
    {"--gpu-memory-utilization", "compute.gpu_memory_utilization", "SHARE",
     "share of a GPU's memory that a rank may use"},
    {"--seed", "scheduler.seed", "SEED", "seed for requests that bring none"},
});

// What the command line said, before anything is read or applied.
struct CommandLine {
  std::string config_path;
  std::vector<std::string> assignments;
  std::vector<std::string> api_keys;
  bool print_config = false;
  std::vector<std::string> values = std::vector<std::string>(kFieldFlags.size());
  std::vector<CLI::Option*> options;
};

void declare(CLI::App& app, CommandLine& line) {
  app.set_help_flag("-h,--help", "print this text");
  app.set_version_flag(
      "--version", version_text("spindled", build_info(), api::kProtocolMajor, api::kProtocolMinor),
      "print version, commit, CUDA and protocol version");
  add_cli_tree_flag(app);
  app.add_option("--config", line.config_path, "configuration file (configs/README.md)")
      ->type_name("FILE");
  app.add_option("--set", line.assignments, "set one field, e.g. --set api.tcp.port=9001")
      ->type_name("FIELD=VALUE")
      ->allow_extra_args(false);
  app.add_flag("--print-config", line.print_config, "print the effective configuration and leave");
  app.add_option("--api-key", line.api_keys,
                 "key that clients must send, may be repeated; SPINDLE_API_KEY in the environment "
                 "keeps it out of the process list")
      ->type_name("KEY")
      ->allow_extra_args(false);
  for (std::size_t i = 0; i < kFieldFlags.size(); ++i) {
    const FieldFlag& flag = kFieldFlags[i];
    line.options.push_back(
        app.add_option(flag.flag, line.values[i], std::string(flag.help) + " [" + flag.path + "]")
            ->type_name(flag.value_name));
  }
}

Status apply_flags(const CommandLine& line, Config& config) {
  for (std::size_t i = 0; i < kFieldFlags.size(); ++i) {
    if (line.options[i]->count() == 0) continue;
    const FieldFlag& flag = kFieldFlags[i];
    const Status status =
        apply_override(config, flag.path, schema_value(flag.path, line.values[i]));
    if (!status.ok()) return status.with_context(flag.flag);
  }
  if (!line.api_keys.empty()) {
    config.mutable_api()->mutable_api_key()->Assign(line.api_keys.begin(), line.api_keys.end());
  }
  for (const std::string& assignment : line.assignments) {
    if (const Status status = apply_assignment(config, assignment); !status.ok()) {
      return status.with_context("--set");
    }
  }
  return ok_status();
}

Result<Config> build_config(const CommandLine& line) {
  Config config;
  if (!line.config_path.empty()) {
    Result<Config> loaded = load_config_file(line.config_path);
    if (!loaded.ok()) return loaded.status();
    config = std::move(loaded).value();
  }
  // The only environment variable that Spindle reads: a key on the command line is visible to every
  // user of the host.
  const char* key = std::getenv("SPINDLE_API_KEY");
  if (key != nullptr && *key != '\0') {
    config.mutable_api()->clear_api_key();
    config.mutable_api()->add_api_key(key);
  }
  if (const Status status = apply_flags(line, config); !status.ok()) return status;
  std::error_code error;
  make_paths_absolute(config, std::filesystem::current_path(error));
  fill_defaults(config);
  if (const Status status = validate_config(config); !status.ok()) return status;
  return config;
}

}  // namespace

std::string_view spindle_version() { return build_info().version; }

Result<Options> parse_command_line(int argc, const char* const* argv) {
  CLI::App app("Serves a language model over the ranks of one MPI job: rank i is pipeline stage i.",
               "spindled");
  app.footer("Start: mpirun -n STAGES spindled --config FILE");
  CommandLine line;
  declare(app, line);
  Options options;
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    options.text = app.help();
    return options;
  } catch (const CLI::CallForVersion& version) {  // and --cli-tree
    options.text = version.what();
    return options;
  } catch (const CLI::ParseError& error) {
    return invalid_argument(std::string(error.what()) + " (spindled --help lists the flags)");
  }
  Result<Config> config = build_config(line);
  if (!config.ok()) return config.status();
  options.config = std::move(config).value();
  options.print_config = line.print_config;
  return options;
}

}  // namespace spindle::config
