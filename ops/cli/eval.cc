#include "ops/cli/eval.h"

#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "ops/cli/eval_calibrate.h"
#include "ops/cli/eval_cluster.h"
#include "ops/cli/eval_plan.h"
#include "ops/cli/eval_report.h"
#include "ops/cli/exit_codes.h"
#include "ops/cli/input.h"
#include "ops/cli/output.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

namespace json = boost::json;
namespace fs = std::filesystem;

constexpr std::chrono::seconds kConnectWait{5};
constexpr std::size_t kCalibrationRecords = 12;

Status write_file(const fs::path& path, const std::string& text) {
  std::error_code error;
  if (path.has_parent_path()) fs::create_directories(path.parent_path(), error);
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
  out.close();
  if (!out) return invalid_argument("cannot write " + path.string() + ": " + std::strerror(errno));
  return ok_status();
}

// Plots first, so that the report can show them from where it is.
Status write_report(const json::array& rows, const EvalOptions& options) {
  std::vector<std::string> shown;
  if (!options.plots.empty()) {
    for (const auto& [name, svg] : report_plots(rows)) {
      const fs::path path = fs::path(options.plots) / name;
      if (Status status = write_file(path, svg); !status.ok()) return status;
      const fs::path from = fs::absolute(options.report).parent_path();
      shown.push_back(fs::absolute(path).lexically_relative(from).generic_string());
    }
  }
  if (options.report.empty()) return ok_status();
  return write_file(options.report, report_text(rows, shown));
}

int report_only(const EvalOptions& options) {
  const Result<std::string> text = read_text_file(options.report_only);
  if (!text.ok()) return report_usage_error(text.status());
  const Result<json::array> rows = parse_rows(*text);
  if (!rows.ok()) return report_usage_error(rows.status().with_context(options.report_only));
  if (Status status = write_report(*rows, options); !status.ok()) return report_usage_error(status);
  if (options.report.empty()) std::cout << report_text(*rows, {}) << std::flush;
  return kExitOk;
}

Result<api::TcpClientOptions> server_of(const EvalOptions& options, const config::Config& config) {
  api::TcpClientOptions client;
  client.client_name = "spindle eval";
  client.api_key = options.api_key;
  if (client.api_key.empty() && config.api().api_key_size() > 0) {
    client.api_key = config.api().api_key(0);
  }
  if (options.server.empty()) {
    const std::string& host = config.api().tcp().host();
    const bool any = host == "0.0.0.0" || host == "::" || host.empty();
    client.host = any ? "127.0.0.1" : host;
    client.port = static_cast<std::uint16_t>(config.api().tcp().port());
    return client;
  }
  const std::size_t colon = options.server.rfind(':');
  const char* end = options.server.data() + options.server.size();
  std::uint16_t port = 0;
  const bool ok = colon != std::string::npos && colon > 0 &&
                  std::from_chars(options.server.data() + colon + 1, end, port).ptr == end &&
                  port != 0;
  if (!ok) return invalid_argument("--server must be HOST:PORT, got \"" + options.server + "\"");
  client.host = options.server.substr(0, colon);
  client.port = port;
  return client;
}

// What a run needs, in the order in which it is found out.
class EvalRun {
 public:
  explicit EvalRun(const EvalOptions& options) : options_(options) {}

  // Returns the exit code.
  int run() {
    Status status = prepare();
    if (!status.ok()) return report_usage_error(status);
    // Blocks Ctrl-C before there are other threads.
    const InterruptSignal interrupt;
    cancel_fd_ = interrupt.fd();
    status = find_server();
    if (status.ok()) status = measure();
    if (cluster_) {
      const Status stopped = cluster_->stop();
      if (status.ok() && !stopped.ok()) status = stopped;
    }
    if (status.ok()) return kExitOk;
    if (status.code() == StatusCode::kCancelled) {
      print_error("interrupted; --resume continues from " + journal_path());
      return kExitInterrupted;
    }
    print_error(status.message());
    return no_server_ ? kExitCannotConnect : kExitRequestFailed;
  }

 private:
  std::string out_path() const {
    if (!options_.calibrate) return options_.json;
    return options_.table.empty() ? "configs/profiles/" + model_.name + ".pbtxt" : options_.table;
  }
  std::string journal_path() const { return out_path() + ".partial.jsonl"; }

  Status prepare() {
    Result<config::Config> config = read_config(options_.config);
    if (!config.ok()) return config.status();
    config_ = *std::move(config);
    Result<EvalModel> model = load_eval_model(config_.model().path());
    if (!model.ok()) return model.status();
    model_ = *std::move(model);
    if (Status status = choose_cells(); !status.ok()) return status;
    const Result<std::string> data = read_gzip(options_.data);
    if (!data.ok()) return data.status();
    Result<std::vector<EvalRecord>> records = parse_records(*data);
    if (!records.ok()) return records.status().with_context(options_.data);
    const std::size_t limit =
        options_.limit == 0 && options_.calibrate ? kCalibrationRecords : options_.limit;
    records_ = spread_records(*std::move(records), limit);
    settings_["data"] = checksum(*data);
    if (!options_.prose.empty()) {
      Result<std::string> prose = read_gzip(options_.prose);
      if (!prose.ok()) return prose.status();
      settings_["prose"] = checksum(*prose);
      prose_ = *std::move(prose);
    }
    Result<api::TcpClientOptions> client = server_of(options_, config_);
    if (!client.ok()) return client.status();
    client_ = *std::move(client);
    return ok_status();
  }

  Status choose_cells() {
    std::set<std::string> seen;
    for (const std::string& name : options_.regimes) {
      const Result<Regime> regime = parse_regime(name);
      if (!regime.ok()) return regime.status();
      if (seen.insert(name).second) regimes_.push_back(*regime);
    }
    if (options_.calibrate) {
      regimes_ = {Regime::kQa};
      cells_ = calibration_cells(model_.n_layers, model_.n_kv_heads);
      return ok_status();
    }
    Result<std::vector<Cell>> cells = make_cells(options_.profiles, options_.bytes);
    if (!cells.ok()) return cells.status();
    cells_ = *std::move(cells);
    return ok_status();
  }

  Status find_server() {
    auto client = api::TcpClient::connect(client_, Deadline::after(kConnectWait));
    max_scores_ = config_.api().limits().max_dense_scores();
    if (!client.ok() && options_.server.empty() &&
        client.status().code() == StatusCode::kUnavailable) {
      OwnClusterOptions own;
      own.config = options_.config;
      own.stages = options_.stages;
      own.log = out_path() + ".cluster.log";
      own.client = client_;
      max_scores_ = own.max_dense_scores;
      std::cerr << "starting a cluster of " << own.stages << " stages, log in " << own.log
                << std::endl;
      if (Status status = make_folder(own.log); !status.ok()) return status;
      auto cluster = OwnCluster::start(own, cancel_fd_);
      if (!cluster.ok()) return cluster.status();
      cluster_ = *std::move(cluster);
      client_ = cluster_->client();
      client = api::TcpClient::connect(client_, Deadline::after(kConnectWait));
    }
    no_server_ = !client.ok();
    if (!client.ok()) return client.status();
    const api::v1::Welcome& welcome = (*client)->welcome();
    max_model_len_ = welcome.max_model_len();
    settings_["spindle_eval_journal"] = 1;
    settings_["mode"] = options_.calibrate ? "calibrate" : "eval";
    settings_["model"] = welcome.model();
    settings_["server_version"] = welcome.server_version();
    settings_["config"] = checksum(config_.SerializeAsString());
    common_ = {{"model", welcome.model()},
               {"server_version", welcome.server_version()},
               {"device", device_of(**client, welcome.n_stages())},
               {"data", fs::path(options_.data).filename().string()}};
    return ok_status();
  }

  static Status make_folder(const fs::path& file) {
    std::error_code error;
    if (file.has_parent_path()) fs::create_directories(file.parent_path(), error);
    if (error) return invalid_argument("cannot make the folder of " + file.string());
    return ok_status();
  }

  static std::string device_of(api::TcpClient& client, int n_stages) {
    std::string text = std::to_string(n_stages) + (n_stages == 1 ? " stage" : " stages");
    const Result<api::v1::Stats> stats = client.stats(Deadline::after(kConnectWait));
    if (!stats.ok()) return text;
    std::set<std::string> devices;
    for (const api::v1::StageStats& stage : stats->stages()) devices.insert(stage.device());
    for (const std::string& device : devices) text += ", " + device;
    return text;
  }

  Status measure() {
    TaskPlan plan;
    if (Status status = add_records(records_, regimes_, cells_, model_, max_model_len_, plan);
        !status.ok()) {
      return status.with_context(options_.data);
    }
    if (!prose_.empty()) {
      if (Status status = add_prose(prose_, options_.prose_prefixes, options_.prose_windows, cells_,
                                    model_, max_model_len_, plan);
          !status.ok()) {
        return status.with_context(options_.prose);
      }
    }
    if (plan.n_too_long > 0) {
      print_error(std::to_string(plan.n_too_long) +
                  " records are left out: longer than the server's context");
    }
    if (plan.n_moved > 0) {
      print_error(std::to_string(plan.n_moved) +
                  " positions lie inside a token; the token's begin was taken");
    }
    common_["cuts_moved"] = plan.n_moved;
    if (Status status = make_folder(journal_path()); !status.ok()) return status;
    auto journal = EvalJournal::open(journal_path(), settings_, options_.resume);
    if (!journal.ok()) return journal.status();
    WorkOptions work{.client = client_,
                     .timeout = std::chrono::milliseconds(
                         static_cast<std::int64_t>(std::ceil(options_.timeout_s * 1000))),
                     .concurrency = options_.concurrency,
                     .sessions = !options_.no_sessions,
                     .max_scores = max_scores_,
                     .cancel_fd = cancel_fd_};
    Result<Results> results = run_tasks(plan.tasks, work, **journal);
    if (!results.ok()) return results.status();
    if (Status status = write(plan, *results); !status.ok()) return status;
    return options_.keep_journal ? ok_status() : (*journal)->remove();
  }

  Status write(const TaskPlan& plan, const Results& results) const {
    if (options_.calibrate) return write_table(plan, results);
    std::vector<EvalItem> items;
    for (const EvalTask& task : plan.tasks) items.push_back(task.item);
    const std::string text = rows_text(summarise(items, cells_, results, common_));
    if (Status status = write_file(out_path(), text); !status.ok()) return status;
    // From the text, so that --report-only writes the same.
    const Result<json::array> rows = parse_rows(text);
    if (!rows.ok()) return rows.status();
    if (Status status = write_report(*rows, options_); !status.ok()) return status;
    std::cout << report_text(*rows, {}) << std::flush;
    return ok_status();
  }

  Status write_table(const TaskPlan& plan, const Results& results) const {
    std::vector<std::string> items;
    for (const EvalTask& task : plan.tasks) items.push_back(task.item.key);
    const Result<profile::Profile> table =
        calibration_table(model_.name, model_.n_layers, model_.n_kv_heads, items, results);
    if (!table.ok()) return table.status();
    const std::string origin = std::to_string(items.size()) + " documents of " +
                               fs::path(options_.data).filename().string() + ".";
    if (Status status = write_file(out_path(), table_text(*table, origin)); !status.ok()) {
      return status;
    }
    std::cout << "wrote " << out_path() << std::endl;
    return ok_status();
  }

  const EvalOptions& options_;
  config::Config config_;
  EvalModel model_;
  std::vector<Regime> regimes_;
  std::vector<Cell> cells_;
  std::vector<EvalRecord> records_;
  std::string prose_;
  api::TcpClientOptions client_;
  int cancel_fd_ = -1;
  std::unique_ptr<OwnCluster> cluster_;
  bool no_server_ = false;
  std::int32_t max_scores_ = 0;
  std::int32_t max_model_len_ = 0;
  json::object settings_;  // what a journal's results depend on
  json::object common_;    // of every row
};

Status check_options(const EvalOptions& options) {
  if (options.config.empty() || options.data.empty()) {
    return invalid_argument("--config and --data are needed (or --report-only)");
  }
  if (options.json.empty() && !options.calibrate) return invalid_argument("--json is needed");
  return ok_status();
}

}  // namespace

void add_eval_options(CLI::App& app, EvalOptions& options) {
  const CLI::Range seconds(0.01, 86400.0);
  app.add_option("--config", options.config, "The cluster's configuration (.pbtxt)")
      ->type_name("FILE");
  app.add_option("--data", options.data, "Records, JSON Lines, gzipped or not")->type_name("FILE");
  app.add_option(
         "--profiles", options.profiles,
         "KV policies to measure; server: what requests without a policy get, at the size that the "
         "server chooses")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--bytes", options.bytes, "KV bytes kept, in percent of the uncompressed ones")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--regime", options.regimes,
                 "qa: the document is compressed; qw: the document and the first question")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--limit", options.limit,
                 "So many records, spread over tasks and lengths; 0: all (12 with --calibrate)");
  app.add_option("--json", options.json, "Where the figures go")->type_name("FILE");
  app.add_option("--prose", options.prose, "Also the perplexity of this text, gzipped or not")
      ->type_name("FILE");
  app.add_option("--prose-windows", options.prose_windows, "At most so many windows of each length")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  app.add_option("--prose-prefixes", options.prose_prefixes, "Compressed prefixes, in tokens")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--report", options.report, "Where a report in Markdown goes")->type_name("FILE");
  app.add_option("--plots", options.plots, "The folder where plots (SVG) go")->type_name("FOLDER");
  auto* only = app.add_option("--report-only", options.report_only,
                              "No measurement: report and plots from this JSON file")
                   ->type_name("FILE");
  app.add_flag("--calibrate", options.calibrate, "Measure every head and write the model's table")
      ->excludes(only);
  app.add_option("--table", options.table,
                 "Where --calibrate writes; default configs/profiles/MODEL.pbtxt")
      ->type_name("FILE");
  app.add_option("--server", options.server,
                 "HOST:PORT of a running cluster; default: where --config listens, and when nobody "
                 "does, a cluster is started there");
  app.add_option("--api-key", options.api_key, "API key; better given in the environment")
      ->envname("SPINDLE_API_KEY");
  app.add_option("--timeout", options.timeout_s, "Longest wait for an answer's next piece, seconds")
      ->check(seconds)
      ->capture_default_str();
  app.add_option("--stages", options.stages, "Stages of a cluster that is started")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--concurrency", options.concurrency, "Records measured at the same time")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app.add_flag("--no-sessions", options.no_sessions,
               "Compute every document anew for every cell instead of once");
  app.add_flag("--resume", options.resume, "Continue a run that did not finish");
  app.add_flag("--keep-journal", options.keep_journal,
               "Keep the single results, so that --resume can add profiles later");
}

int run_eval(const EvalOptions& options) {
  if (!options.report_only.empty()) return report_only(options);
  if (Status status = check_options(options); !status.ok()) return report_usage_error(status);
  return EvalRun(options).run();
}

}  // namespace spindle::cli
