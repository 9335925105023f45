#pragma once
// `spindle eval`: quality against KV bytes, measured in a running cluster; with --calibrate, the
// table of a model's heads.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

namespace spindle::cli {

struct EvalOptions {
  std::string config;
  std::string data;
  std::vector<std::string> profiles{"full", "spindle"};
  std::vector<double> bytes{50, 25};
  std::vector<std::string> regimes{"qa"};
  std::size_t limit = 0;  // 0: all; a calibration takes 12
  std::string json;
  std::string prose;
  std::size_t prose_windows = 15;
  std::vector<std::int32_t> prose_prefixes{4096, 7000};
  std::string report;
  std::string plots;
  std::string report_only;
  bool calibrate = false;
  std::string table;  // empty: configs/profiles/MODEL.pbtxt
  std::string server;
  std::string api_key;
  double timeout_s = 300;
  int stages = 1;
  int concurrency = 2;
  bool no_sessions = false;
  bool resume = false;
  bool keep_journal = false;
};

void add_eval_options(CLI::App& app, EvalOptions& options);
// Returns the exit code.
int run_eval(const EvalOptions& options);

}  // namespace spindle::cli
