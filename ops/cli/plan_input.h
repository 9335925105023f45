#pragma once
// What `spindle plan` is asked: flags and a configuration file, and what they become.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/coordinator/sizing.h"
#include "kernels/core/status.h"

namespace spindle::cli {

struct PlanOptions {
  std::string config;            // a configuration file; empty: none
  std::vector<std::string> set;  // FIELD=VALUE
  // Flags that are another name for a field of the configuration, in the order of plan_input.cc.
  std::vector<std::string> fields;
  std::optional<int> n_devices;
  std::string gpu_memory;                     // of each GPU
  std::vector<std::string> device_memory;     // of each device
  std::vector<std::string> device_bandwidth;  // GB/s
  std::int64_t context = 0;
  std::int64_t output = 512;
  std::optional<std::int64_t> concurrency;
  bool json = false;
};

void add_plan_options(CLI::App& app, PlanOptions& options);

struct PlanQuestion {
  std::string model_name;
  std::int64_t n_weights = 0;          // of the whole model, tied embeddings once
  std::uint64_t checkpoint_bytes = 0;  // of them, as the checkpoint has them
  coordinator::ClusterDescription cluster;
  coordinator::RequestKind kind;  // its table is `table`
  std::optional<kvstore::ProfileTable> table;
};
// Reads the files. INVALID_ARGUMENT naming the flag and its value, or the field of the file.
Result<PlanQuestion> read_plan_question(const PlanOptions& options);

// "80GiB", "24 GB", "512MiB", "1073741824"; from 1 byte to 2^49.
Result<std::uint64_t> parse_memory(std::string_view flag, std::string_view text);

}  // namespace spindle::cli
