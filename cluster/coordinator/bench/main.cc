// How many requests and tokens a pipeline can take, by simulation: from two stages to 64, equal and
// unequal memories, with rank 0's real scheduler and ledger.
//
//   build/bin/spindle_scale --json scale.json [--models 8b,70b] [--stages 2,4,8] [--requests 10000]
//
// Every figure is of a virtual clock but the decisions' cost, which is this machine's CPU time.

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <string>
#include <vector>

#include "cluster/coordinator/bench/capacity_run.h"

namespace spindle::coordinator::bench {
namespace {

namespace json = boost::json;

struct Options {
  std::string json_file;
  std::vector<std::string> models = {"8b", "70b"};
  std::vector<int> stages = {2, 4, 8, 16, 32, 64};
  std::vector<std::string> memories = {"equal", "one-third", "uneven"};
  std::vector<double> memory_gb = {24, 141};  // of a device, for each model
  std::string policy = "full";
  bool balances = false;
  int n_requests = 10'000;
  int max_num_seqs = 16'384;
  int max_num_batched_tokens = 2'048;
  int mean_output = 200;
  std::uint64_t seed = 1;
};

// This thread's own time: other processes do not count.
std::int64_t cpu_ns() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

json::object stage_json(const StageUse& use) {
  return {{"layers", use.n_layers},
          {"pages", use.n_pages},
          {"busy_share", use.busy_share},
          {"used_share", use.used_share},
          {"reserved_share", use.reserved_share}};
}

json::object result_json(const CapacityResult& result) {
  json::array stages;
  for (const StageUse& use : result.stages) stages.push_back(stage_json(use));
  return {{"waits", result.waits},
          {"window_s", result.window_s},
          {"makespan_s", result.makespan_s},
          {"concurrency", result.concurrency},
          {"output_per_s", result.output_per_s},
          {"run_per_s", result.run_per_s},
          {"batch_tokens", result.batch_tokens},
          {"step_us", result.step_us},
          {"mean_prompt", result.mean_prompt},
          {"mean_output", result.mean_output},
          {"decision_mean_us", result.decision_mean_us},
          {"decision_p50_us", result.decision_p50_us},
          {"decision_p99_us", result.decision_p99_us},
          {"decision_share", result.decision_share},
          {"steps", result.n_steps},
          {"preemptions", result.n_preemptions},
          {"budget_plans", result.n_budget_plans},
          {"levels", json::array(result.levels.begin(), result.levels.end())},
          {"cpu_s", result.cpu_s},
          {"stages", std::move(stages)}};
}

json::object load_json(const LoadSettings& load, const Options& options) {
  return {{"requests", load.n_requests},
          {"median_prompt", load.median_prompt},
          {"sigma", load.sigma},
          {"document_share", load.document_share},
          {"max_prompt", load.max_prompt},
          {"max_output", load.max_output},
          {"waiting", load.n_waiting},
          {"mean_output", options.mean_output},
          {"max_num_seqs", options.max_num_seqs},
          {"max_num_batched_tokens", options.max_num_batched_tokens},
          {"policy", options.policy},
          {"balances", options.balances},
          {"seed", options.seed}};
}

json::object rates_json(const DeviceRates& rates) {
  return {{"read_gb_per_s", rates.read_bytes_per_us * 1e-3},
          {"products_tflop_per_s", rates.flops_per_us * 1e-6},
          {"attention_tflop_per_s", rates.attention_flops_per_us * 1e-6},
          {"launch_us", rates.launch_us},
          {"link_gb_per_s", rates.link_bytes_per_us * 1e-3},
          {"link_us", rates.link_us},
          {"control_us", rates.control_us}};
}

// One cell; prints a line.
Result<json::object> run_cell(const Options& options, const std::string& model, double memory_gb,
                              const std::string& memories, int n_stages, LoadSettings load) {
  auto shape = model_shape(model);
  if (!shape.ok()) return shape.status();
  CapacitySettings settings;
  settings.shape = *shape;
  settings.rates = h200_rates();
  settings.n_stages = n_stages;
  settings.memory_bytes = static_cast<std::uint64_t>(memory_gb * 1e9);
  settings.max_model_len = load.max_prompt + load.max_output;
  settings.max_num_seqs = options.max_num_seqs;
  settings.max_num_batched_tokens = options.max_num_batched_tokens;
  settings.mean_output = options.mean_output;
  settings.policy = load.policy;
  settings.balances = options.balances;
  settings.typical_tokens = static_cast<std::int64_t>(load.median_prompt);
  settings.seed = options.seed;
  for (const Memories kind : {Memories::kEqual, Memories::kOneThird, Memories::kUneven}) {
    if (memories_name(kind) == memories) settings.memories = kind;
  }
  if (memories_name(settings.memories) != memories) {
    return invalid_argument("memories: \"" + memories + "\" is unknown");
  }
  load.vocab_size = settings.shape.vocab_size;
  const auto cluster = capacity_cluster(settings);
  if (!cluster.ok()) return cluster.status();
  const CapacityResult result = run_capacity(*cluster, load, cpu_ns);
  if (!result.violation.empty()) return internal_error(result.violation);
  std::printf(
      "%-4s %2d stages, %-9s %7.0f running, %8.0f output tokens/s, step %7.0f us, decision "
      "%6.1f us (%.2f %%)%s, %.0f s\n",
      model.c_str(), n_stages, memories.c_str(), result.concurrency, result.output_per_s,
      result.step_us, result.decision_mean_us, 100 * result.decision_share,
      result.waits ? "" : ", nobody waits", result.cpu_s);
  std::fflush(stdout);
  json::object cell = result_json(result);
  cell["model"] = settings.shape.name;
  cell["memory_gb"] = memory_gb;
  cell["memories"] = memories;
  cell["n_stages"] = n_stages;
  return cell;
}

int run(const Options& options) {
  LoadSettings load;
  load.n_requests = options.n_requests;
  load.seed = options.seed;
  const auto profile = kvstore::parse_profile(options.policy);
  if (!profile || options.memory_gb.size() != options.models.size()) {
    std::fprintf(stderr, "spindle_scale: %s\n",
                 profile ? "one --memory-gb for each model" : "an unknown --policy");
    return 2;
  }
  load.policy.profile = *profile;
  load.policy.best_effort = true;
  json::array cells;
  json::array left_out;
  for (std::size_t m = 0; m < options.models.size(); ++m) {
    for (const std::string& memories : options.memories) {
      for (const int n_stages : options.stages) {
        auto cell =
            run_cell(options, options.models[m], options.memory_gb[m], memories, n_stages, load);
        if (cell.ok()) {
          cells.push_back(*std::move(cell));
          continue;
        }
        std::printf("%-4s %2d stages, %-9s left out: %s\n", options.models[m].c_str(), n_stages,
                    memories.c_str(), cell.status().message().c_str());
        if (cell.status().code() == StatusCode::kInternal) return 1;
        left_out.push_back(json::object{{"model", options.models[m]},
                                        {"memories", memories},
                                        {"n_stages", n_stages},
                                        {"reason", cell.status().message()}});
      }
    }
  }
  if (options.json_file.empty()) return 0;
  std::ofstream out(options.json_file);
  out << json::object{{"load", load_json(load, options)},
                      {"device", rates_json(h200_rates())},
                      {"cells", std::move(cells)},
                      {"left_out", std::move(left_out)}}
      << "\n";
  return out.good() ? 0 : 1;
}

}  // namespace
}  // namespace spindle::coordinator::bench

int main(int argc, char** argv) {
  spindle::coordinator::bench::Options options;
  CLI::App app{"How many requests a pipeline can take, by simulation"};
  app.add_option("--json", options.json_file, "write the figures there");
  app.add_option("--models", options.models, "8b, 70b")->delimiter(',');
  app.add_option("--memory-gb", options.memory_gb, "of a device, for each model")->delimiter(',');
  app.add_option("--stages", options.stages, "numbers of stages")->delimiter(',');
  app.add_option("--memories", options.memories, "equal, one-third, uneven")->delimiter(',');
  app.add_option("--policy", options.policy, "KV profile of all requests");
  app.add_flag("--balance", options.balances, "move KV budgets between the stages");
  app.add_option("--requests", options.n_requests)->check(CLI::Range(20, 1'000'000));
  app.add_option("--max-num-seqs", options.max_num_seqs)->check(CLI::PositiveNumber);
  app.add_option("--max-num-batched-tokens", options.max_num_batched_tokens)
      ->check(CLI::PositiveNumber);
  app.add_option("--mean-output", options.mean_output)->check(CLI::PositiveNumber);
  app.add_option("--seed", options.seed);
  CLI11_PARSE(app, argc, argv);
  return spindle::coordinator::bench::run(options);
}
