// `spindle`: the client program. Talks to a running cluster through the TCP API.

#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>
#include <string>

#include "cluster/api/framing.h"
#include "kernels/core/build_info.h"
#include "kernels/core/cli_tree.h"
#include "ops/cli/bench.h"
#include "ops/cli/chat.h"
#include "ops/cli/complete.h"
#include "ops/cli/eval.h"
#include "ops/cli/exit_codes.h"
#include "ops/cli/inspect.h"
#include "ops/cli/output.h"
#include "ops/cli/plan.h"
#include "ops/cli/stats.h"
#include "ops/cli/trace.h"

namespace {

constexpr const char* kFooter =
    "Exit codes: 0 ok, 1 the request failed, 2 wrong usage, 3 cannot connect, 130 interrupted.\n"
    "Environment: SPINDLE_API_KEY; NO_COLOR turns colours off.";

int run(int argc, char** argv) {
  using namespace spindle::cli;
  CLI::App app("Client of a Spindle cluster", "spindle");
  // exit() prints a line break of its own.
  std::string version = spindle::version_text(
      "spindle", spindle::build_info(), spindle::api::kProtocolMajor, spindle::api::kProtocolMinor);
  version.pop_back();
  app.set_version_flag("--version", version, "Print version, commit, CUDA and protocol version");
  spindle::add_cli_tree_flag(app);
  app.require_subcommand(1);
  app.footer(kFooter);

  ChatOptions chat_options;
  auto* chat = app.add_subcommand("chat", "Talk to the model");
  add_chat_options(*chat, chat_options);
  CompleteOptions complete_options;
  auto* complete = app.add_subcommand("complete", "Continue a text");
  add_complete_options(*complete, complete_options);
  StatsOptions stats_options;
  auto* stats = app.add_subcommand("stats", "Requests, tokens and KV memory of every stage");
  add_stats_options(*stats, stats_options);
  DrainOptions drain_options;
  auto* drain = app.add_subcommand("drain", "Finish the running requests, then stop the cluster");
  add_drain_options(*drain, drain_options);
  BenchOptions bench_options;
  auto* bench = app.add_subcommand("bench", "Put a load on the cluster and measure it");
  add_bench_options(*bench, bench_options);
  InspectOptions inspect_options;
  auto* inspect = app.add_subcommand("inspect", "What is kept of a prompt's KV, layer by layer");
  add_inspect_options(*inspect, inspect_options);
  EvalOptions eval_options;
  auto* eval = app.add_subcommand("eval", "Measure quality against KV bytes, or calibrate a model");
  add_eval_options(*eval, eval_options);
  PlanOptions plan_options;
  auto* plan = app.add_subcommand("plan", "How much KV a cluster has, and how many requests run");
  add_plan_options(*plan, plan_options);

  TraceOptions trace_options;
  auto* trace = app.add_subcommand("trace", "Record a timeline of all ranks, for Perfetto");
  add_trace_options(*trace, trace_options);
  LogLevelOptions log_level_options;
  auto* log_level = app.add_subcommand("log-level", "Change the level of the cluster's log");
  add_log_level_options(*log_level, log_level_options);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  if (chat->parsed()) {
    return run_chat(chat_options);
  }
  if (complete->parsed()) {
    return run_complete(complete_options);
  }
  if (bench->parsed()) {
    return run_bench(bench_options);
  }
  if (inspect->parsed()) {
    return run_inspect(inspect_options);
  }
  if (eval->parsed()) {
    return run_eval(eval_options);
  }
  if (plan->parsed()) {
    return run_plan(plan_options);
  }
  if (trace->parsed()) {
    return run_trace(trace_options);
  }
  if (log_level->parsed()) {
    return run_log_level(log_level_options);
  }
  return stats->parsed() ? run_stats(stats_options) : run_drain(drain_options);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {  // out of memory, a broken standard library call
    spindle::cli::print_error(error.what());
    return spindle::cli::kExitRequestFailed;
  }
}
