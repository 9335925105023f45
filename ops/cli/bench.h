#pragma once
// `spindle bench`: a load on a running cluster, measured as `vllm bench serve` measures it.

#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ops/cli/options.h"

namespace spindle::cli {

struct BenchOptions {
  ConnectionOptions connection;
  KvOptions kv;
  std::string model;
  std::string dataset = "random";
  std::string dataset_path;
  std::int32_t random_input_len = 1024;
  std::int32_t random_output_len = 128;
  std::int32_t random_prefix_len = 0;
  double random_range_ratio = 0;
  std::int32_t output_len = 256;  // of the other datasets
  std::size_t document_bytes = 32768;
  std::size_t num_prompts = 1000;
  std::size_t num_warmups = 0;
  std::string request_rate = "inf";
  double burstiness = 1;
  std::string ramp_up_strategy;
  double ramp_up_start_rps = 0;
  double ramp_up_end_rps = 0;
  std::size_t max_concurrency = 0;
  std::uint64_t seed = 0;
  float temperature = 0;
  bool ignore_eos = false;
  std::vector<std::string> percentile_metrics = {"ttft", "tpot", "itl"};
  std::vector<double> metric_percentiles = {99};
  std::vector<std::string> goodput;
  bool json = false;
  bool save_result = false;
  bool save_detailed = false;
  std::string result_dir;
  std::string result_filename;
};

void add_bench_options(CLI::App& app, BenchOptions& options);
// Returns the exit code: kExitRequestFailed when any request failed.
int run_bench(const BenchOptions& options);

}  // namespace spindle::cli
