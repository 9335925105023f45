#pragma once
// `spindle stats` and `spindle drain`: look at a running cluster, and stop it gently.

#include <CLI/CLI.hpp>
#include <string>

#include "ops/cli/options.h"

namespace spindle::cli {

struct StatsOptions {
  ConnectionOptions connection;
  bool json = false;
  bool layers = false;
};

struct DrainOptions {
  ConnectionOptions connection;
  bool json = false;
  bool wait = false;
};

void add_stats_options(CLI::App& app, StatsOptions& options);
void add_drain_options(CLI::App& app, DrainOptions& options);
// Both return the exit code.
int run_stats(const StatsOptions& options);
int run_drain(const DrainOptions& options);

// The table for people; `layers` adds one line per layer.
std::string stats_table(const api::v1::Stats& stats, bool layers);

}  // namespace spindle::cli
