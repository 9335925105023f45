#include "ops/cli/bench.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>
#include <optional>
#include <utility>

#include "ops/cli/bench_load.h"
#include "ops/cli/bench_run.h"
#include "ops/cli/bench_summary.h"
#include "ops/cli/exit_codes.h"
#include "ops/cli/input.h"
#include "ops/cli/output.h"
#include "ops/cli/progress.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

constexpr std::chrono::milliseconds kInterruptPoll{50};

Result<double> parse_rate(const std::string& text) {
  if (text == "inf") return std::numeric_limits<double>::infinity();
  double rate = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rate);
  if (error != std::errc{} || end != text.data() + text.size() || !(rate > 0)) {
    return invalid_argument("--request-rate is requests per second or inf, not '" + text + "'");
  }
  return rate;
}

Result<Arrivals> arrivals_of(const BenchOptions& options) {
  const Result<double> rate = parse_rate(options.request_rate);
  if (!rate.ok()) return rate.status();
  Arrivals arrivals{.rate = *rate, .burstiness = options.burstiness};
  if (options.ramp_up_strategy.empty()) {
    if (options.ramp_up_start_rps == 0 && options.ramp_up_end_rps == 0) return arrivals;
    return invalid_argument("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy");
  }
  if (std::isfinite(*rate)) {
    return invalid_argument("--request-rate and --ramp-up-strategy exclude each other");
  }
  if (options.ramp_up_start_rps <= 0 || options.ramp_up_end_rps <= 0) {
    return invalid_argument("a ramp needs --ramp-up-start-rps and --ramp-up-end-rps above 0");
  }
  arrivals.ramp =
      options.ramp_up_strategy == "linear" ? Arrivals::Ramp::kLinear : Arrivals::Ramp::kExponential;
  arrivals.ramp_start = options.ramp_up_start_rps;
  arrivals.ramp_end = options.ramp_up_end_rps;
  return arrivals;
}

Result<BenchSummaryOptions> summary_options_of(const BenchOptions& options) {
  BenchSummaryOptions out;
  out.metrics.clear();
  for (const std::string& name : options.percentile_metrics) {
    const auto metric = metric_of(name);
    if (!metric)
      return invalid_argument("--percentile-metrics: no metric is called '" + name + "'");
    out.metrics.push_back(*metric);
  }
  out.percentiles = options.metric_percentiles;
  for (const std::string& text : options.goodput) {
    const Result<BenchGoal> goal = parse_goal(text);
    if (!goal.ok()) return goal.status();
    out.goals.push_back(*goal);
  }
  return out;
}

// All prompts are made before the first is sent.
constexpr double kMostPromptBytes = 4.0 * (1U << 30U);
Status too_much() {
  return invalid_argument("all prompts together may have 4 GiB; take fewer or shorter ones");
}
std::size_t longest_line(std::string_view text) {
  std::size_t longest = 0;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    longest = std::max(longest, end);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return longest;
}

Result<std::vector<BenchPrompt>> prompts_of(const BenchOptions& options,
                                            const api::v1::Welcome& welcome) {
  if (options.dataset == "random") {
    if (!options.dataset_path.empty()) {
      return invalid_argument("--dataset-name random takes no --dataset-path");
    }
    const double tokens =
        static_cast<double>(options.num_prompts) *
        (options.random_prefix_len + options.random_input_len * (1 + options.random_range_ratio));
    if (tokens > kMostPromptBytes / sizeof(std::int32_t)) return too_much();
    if (welcome.vocab_size() <= 0) {
      return invalid_argument(
          "the server does not say how large its vocabulary is; take another "
          "--dataset-name than random");
    }
    return random_prompts({.input_tokens = options.random_input_len,
                           .output_tokens = options.random_output_len,
                           .prefix_tokens = options.random_prefix_len,
                           .range_ratio = options.random_range_ratio},
                          options.num_prompts, welcome.vocab_size(), options.seed);
  }
  if (options.dataset_path.empty()) {
    return invalid_argument("--dataset-name " + options.dataset + " needs --dataset-path");
  }
  const Result<std::string> text = read_text_file(options.dataset_path);
  if (!text.ok()) return text.status();
  const std::size_t longest =
      options.dataset == "document" ? options.document_bytes : longest_line(*text);
  if (static_cast<double>(options.num_prompts) * static_cast<double>(longest) > kMostPromptBytes) {
    return too_much();
  }
  Result<std::vector<BenchPrompt>> prompts =
      options.dataset == "custom"
          ? custom_prompts(*text, options.num_prompts, options.output_len)
          : document_prompts(*text, options.num_prompts, options.document_bytes, options.output_len,
                             options.seed);
  if (!prompts.ok()) return prompts.status().with_context(options.dataset_path);
  return prompts;
}

Result<api::v1::GenerateRequest> request_of(const BenchOptions& options) {
  if (!options.kv.session.empty()) {
    return invalid_argument("a session belongs to one conversation, not to a load");
  }
  api::v1::GenerateRequest request;
  request.set_model(options.model);
  request.mutable_sampling()->set_temperature(options.temperature);
  request.mutable_sampling()->set_ignore_eos(options.ignore_eos);
  if (const Status status = set_kv_fields(options.kv, request); !status.ok()) return status;
  return request;
}

// The load on other threads, while this one listens for Ctrl-C.
Result<BenchRun> run_interruptibly(const BenchRunOptions& options,
                                   const std::vector<BenchPrompt>& prompts,
                                   const std::vector<double>& times,
                                   const InterruptSignal& interrupt, bool& interrupted) {
  Progress progress(prompts.size(), 0, "requests");
  std::atomic<bool> stop = false;
  auto run = std::async(std::launch::async, [&] {
    return run_load(options, prompts, times, stop, [&progress] { progress.step(); });
  });
  while (run.wait_for(kInterruptPoll) != std::future_status::ready) {
    if (interrupt.take()) {
      interrupted = true;
      stop = true;
    }
  }
  return run.get();
}

std::string time_text(const char* format) {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char text[64];
  return {text, std::strftime(text, sizeof(text), format, &local)};
}

std::filesystem::path result_path(const BenchOptions& options, const std::string& model) {
  std::filesystem::path path = options.result_filename;
  if (path.empty()) {
    std::string name = "spindle-" + options.request_rate + "qps";
    if (options.max_concurrency > 0) {
      name += "-concurrency" + std::to_string(options.max_concurrency);
    }
    name += "-" + std::filesystem::path(model).filename().string();
    path = name + "-" + time_text("%Y%m%d-%H%M%S") + ".json";
  }
  return options.result_dir.empty() ? path : std::filesystem::path(options.result_dir) / path;
}

Status save(const std::filesystem::path& path, const boost::json::object& result) {
  if (path.has_parent_path()) {
    std::error_code error;
    std::filesystem::create_directories(path.parent_path(), error);
    if (error) return invalid_argument(path.parent_path().string() + ": " + error.message());
  }
  std::ofstream file(path);
  file << boost::json::serialize(result) << "\n";
  file.close();
  if (!file) return invalid_argument("cannot write " + path.string());
  return {};
}

boost::json::object result_of(const BenchOptions& options, const std::string& model, double rate,
                              const BenchSummary& summary,
                              const BenchSummaryOptions& summary_options) {
  boost::json::object result{{"date", time_text("%Y%m%d-%H%M%S")},
                             {"backend", "spindle"},
                             {"model_id", model},
                             {"num_prompts", options.num_prompts},
                             {"request_rate", nullptr},
                             {"burstiness", options.burstiness},
                             {"max_concurrency", nullptr}};
  // JSON has no infinity.
  result["request_rate"] =
      std::isfinite(rate) ? boost::json::value(rate) : boost::json::value("inf");
  if (options.max_concurrency > 0) result["max_concurrency"] = options.max_concurrency;
  for (auto& [key, value] : to_json(summary, summary_options)) result[key] = std::move(value);
  return result;
}

void show_errors(const std::vector<BenchRecord>& records) {
  constexpr std::size_t kMost = 3;
  std::size_t n = 0;
  for (const BenchRecord& record : records) {
    if (record.error.empty()) continue;
    if (n++ < kMost) print_error(record.error);
  }
  if (n > kMost) print_error("and " + std::to_string(n - kMost) + " more failed");
}

}  // namespace

void add_bench_options(CLI::App& app, BenchOptions& options) {
  app.add_option("--model", options.model, "Model id; default: the served model");
  app.add_option("--dataset-name", options.dataset,
                 "random: token ids; custom: JSON Lines with \"prompt\" and perhaps "
                 "\"output_len\"; document: pieces of a long text")
      ->check(CLI::IsMember({"random", "custom", "document"}))
      ->capture_default_str();
  app.add_option("--dataset-path", options.dataset_path, "The file of custom and document")
      ->type_name("FILE");
  app.add_option("--random-input-len", options.random_input_len, "Tokens of a prompt")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--random-output-len", options.random_output_len, "Tokens of an answer")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--random-prefix-len", options.random_prefix_len,
                 "Tokens that all prompts begin with, on top")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  app.add_option("--random-range-ratio", options.random_range_ratio,
                 "Lengths are within so much of those given, as a share")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--output-len", options.output_len,
                 "Tokens of an answer, custom and document datasets")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--document-bytes", options.document_bytes, "Of a prompt, document dataset")
      ->check(CLI::Range(std::size_t{1}, kMaxInputBytes))
      ->capture_default_str();
  app.add_option("--num-prompts", options.num_prompts, "Requests")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--num-warmups", options.num_warmups, "Requests before, which do not count")
      ->check(CLI::Range(0, 1 << 16))
      ->capture_default_str();
  app.add_option("--request-rate", options.request_rate, "Requests per second; inf: all at once")
      ->capture_default_str();
  app.add_option("--burstiness", options.burstiness,
                 "Shape of the gamma distribution of the gaps: 1 is a Poisson process, less is "
                 "burstier")
      ->check(CLI::Range(1e-3, 1e6))
      ->capture_default_str();
  app.add_option("--ramp-up-strategy", options.ramp_up_strategy,
                 "The rate goes from the start to the end over the requests")
      ->check(CLI::IsMember({"linear", "exponential"}));
  app.add_option("--ramp-up-start-rps", options.ramp_up_start_rps, "Requests per second");
  app.add_option("--ramp-up-end-rps", options.ramp_up_end_rps, "Requests per second");
  app.add_option(
         "--max-concurrency", options.max_concurrency,
         "Requests at a time; others wait here. Default: " + std::to_string(kMostConcurrency))
      ->check(CLI::Range(std::size_t{1}, kMostConcurrency));
  app.add_option("--seed", options.seed, "Of prompts and arrivals")->capture_default_str();
  app.add_option("--temperature", options.temperature, "Of sampling")->capture_default_str();
  app.add_flag("--ignore-eos", options.ignore_eos, "Answers have all their tokens");
  app.add_option("--percentile-metrics", options.percentile_metrics,
                 "Of ttft, tpot, itl, e2el: what is shown")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--metric-percentiles", options.metric_percentiles, "Which percentiles")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--goodput", options.goodput,
                 "ttft:MS tpot:MS e2el:MS; goodput counts the requests that keep all of them");
  app.add_flag("--json", options.json, "The result as JSON on standard output");
  app.add_flag("--save-result", options.save_result, "The result as JSON in a file");
  app.add_flag("--save-detailed", options.save_detailed,
               "In the JSON also each request's times, text and error");
  app.add_option("--result-dir", options.result_dir, "Where the file goes; default: here")
      ->type_name("FOLDER");
  app.add_option("--result-filename", options.result_filename,
                 "Default: spindle-RATEqps-MODEL-TIME.json")
      ->type_name("FILE");
  add_kv_options(app, options.kv);
  add_connection_options(app, options.connection);
}

int run_bench(const BenchOptions& options) {
  const Result<Arrivals> arrivals = arrivals_of(options);
  if (!arrivals.ok()) return report_usage_error(arrivals.status());
  const Result<BenchSummaryOptions> summary_options = summary_options_of(options);
  if (!summary_options.ok()) return report_usage_error(summary_options.status());
  Result<api::v1::GenerateRequest> request = request_of(options);
  if (!request.ok()) return report_usage_error(request.status());

  const InterruptSignal interrupt;
  std::string model;
  std::vector<BenchPrompt> prompts;
  {
    const Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
    if (!client.ok()) return report_connect_error(client.status(), options.connection);
    model = (*client)->welcome().model();
    Result<std::vector<BenchPrompt>> made = prompts_of(options, (*client)->welcome());
    if (!made.ok()) return report_usage_error(made.status());
    prompts = *std::move(made);
  }

  const BenchRunOptions run_options{.connection = options.connection,
                                    .request = *std::move(request),
                                    .max_concurrency = options.max_concurrency,
                                    .keep_text = options.save_detailed};
  bool interrupted = false;
  if (options.num_warmups > 0) {
    std::vector<BenchPrompt> warm_up;
    for (std::size_t i = 0; i < options.num_warmups; ++i) {
      warm_up.push_back(prompts[i % prompts.size()]);
    }
    const std::vector<double> at_once(warm_up.size(), 0.0);
    const Result<BenchRun> run =
        run_interruptibly(run_options, warm_up, at_once, interrupt, interrupted);
    if (!run.ok()) return report_connect_error(run.status(), options.connection);
    if (interrupted) return kExitInterrupted;
  }
  const std::vector<double> times = arrival_times(*arrivals, prompts.size(), options.seed);
  const Result<BenchRun> run =
      run_interruptibly(run_options, prompts, times, interrupt, interrupted);
  if (!run.ok()) return report_connect_error(run.status(), options.connection);

  const BenchSummary summary = summarize(run->records, run->duration, *summary_options);
  boost::json::object result = result_of(options, model, arrivals->rate, summary, *summary_options);
  if (options.save_detailed) add_details(result, run->records);
  if (options.json) {
    std::cout << boost::json::serialize(result) << std::endl;
  } else {
    std::cout << report_text(summary, *summary_options, arrivals->rate, options.max_concurrency)
              << std::flush;
  }
  show_errors(run->records);
  if (options.save_result || options.save_detailed || !options.result_dir.empty() ||
      !options.result_filename.empty()) {
    const std::filesystem::path path = result_path(options, model);
    if (const Status status = save(path, result); !status.ok()) {
      return report_usage_error(status);
    }
  }
  if (interrupted) return kExitInterrupted;
  return summary.failed > 0 ? kExitRequestFailed : kExitOk;
}

}  // namespace spindle::cli
