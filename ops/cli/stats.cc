#include "ops/cli/stats.h"

#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <iostream>
#include <utility>
#include <vector>

#include "ops/cli/exit_codes.h"
#include "ops/cli/output.h"
#include "ops/cli/terminal.h"

namespace spindle::cli {
namespace {

using Row = std::vector<std::string>;

// Columns as wide as their widest cell, two spaces apart.
std::string align(const std::vector<Row>& rows) {
  std::vector<std::size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  std::string out;
  for (const Row& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      line += row[i] + std::string(widths[i] - row[i].size() + 2, ' ');
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string percent(std::uint64_t part, std::uint64_t whole) {
  return whole == 0 ? "-" : std::to_string(part * 100 / whole) + "%";
}

std::string layer_range(const api::v1::StageStats& stage) {
  const std::int32_t last = stage.first_layer() + stage.n_layers() - 1;
  const std::string first = std::to_string(stage.first_layer());
  return stage.n_layers() == 1 ? first : first + "-" + std::to_string(last);
}

boost::json::object to_json(const api::v1::StageStats& stage) {
  boost::json::array layers;
  for (const api::v1::LayerKv& layer : stage.layers()) {
    layers.emplace_back(
        boost::json::object{{"layer", layer.layer()}, {"used_bytes", layer.used_bytes()}});
  }
  return {{"stage", stage.stage()},
          {"host", stage.host()},
          {"device", stage.device()},
          {"first_layer", stage.first_layer()},
          {"n_layers", stage.n_layers()},
          {"weight_bytes", stage.weight_bytes()},
          {"kv_capacity_bytes", stage.kv_capacity_bytes()},
          {"kv_used_bytes", stage.kv_used_bytes()},
          {"kv_peak_bytes", stage.kv_peak_bytes()},
          {"kv_committed_bytes", stage.kv_committed_bytes()},
          {"kv_level_ratio", stage.kv_level_ratio()},
          {"steps", stage.steps()},
          {"busy_seconds", stage.busy_seconds()},
          {"layers", std::move(layers)}};
}

boost::json::object to_json(const api::v1::Stats& stats) {
  boost::json::array stages;
  for (const api::v1::StageStats& stage : stats.stages()) {
    stages.emplace_back(to_json(stage));
  }
  return {{"model", stats.model()},
          {"server_version", stats.server_version()},
          {"uptime_seconds", stats.uptime_seconds()},
          {"draining", stats.draining()},
          {"running_requests", stats.running_requests()},
          {"waiting_requests", stats.waiting_requests()},
          {"waiting_prompt_tokens", stats.waiting_prompt_tokens()},
          {"prompt_tokens", stats.prompt_tokens()},
          {"generation_tokens", stats.generation_tokens()},
          {"steps", stats.steps()},
          {"requests_accepted", stats.requests_accepted()},
          {"requests_finished", stats.requests_finished()},
          {"requests_failed", stats.requests_failed()},
          {"requests_cancelled", stats.requests_cancelled()},
          {"requests_refused", stats.requests_refused()},
          {"requests_expired", stats.requests_expired()},
          {"preemptions", stats.preemptions()},
          {"budget_plans", stats.budget_plans()},
          {"recomputed_tokens", stats.recomputed_tokens()},
          {"stages", std::move(stages)}};
}

}  // namespace

std::string stats_table(const api::v1::Stats& stats, bool layers) {
  std::string out = "model     " + stats.model() + " (server " + stats.server_version() + ", up " +
                    format_seconds(stats.uptime_seconds()) +
                    (stats.draining() ? ", draining)\n" : ")\n");
  out += "requests  " + std::to_string(stats.running_requests()) + " running, " +
         std::to_string(stats.waiting_requests()) + " waiting; " +
         std::to_string(stats.requests_accepted()) + " accepted, " +
         std::to_string(stats.requests_finished()) + " finished, " +
         std::to_string(stats.requests_failed()) + " failed, " +
         std::to_string(stats.requests_cancelled()) + " cancelled, " +
         std::to_string(stats.requests_refused()) + " refused\n";
  out += "tokens    " + std::to_string(stats.prompt_tokens()) + " prompt, " +
         std::to_string(stats.generation_tokens()) + " generated, in " +
         std::to_string(stats.steps()) + " steps\n\n";

  std::vector<Row> rows{{"stage", "host", "device", "layers", "weights", "KV used", "KV capacity",
                         "used", "KV peak", "steps", "busy"}};
  for (const api::v1::StageStats& stage : stats.stages()) {
    rows.push_back({std::to_string(stage.stage()), stage.host(), stage.device(), layer_range(stage),
                    format_bytes(stage.weight_bytes()), format_bytes(stage.kv_used_bytes()),
                    format_bytes(stage.kv_capacity_bytes()),
                    percent(stage.kv_used_bytes(), stage.kv_capacity_bytes()),
                    format_bytes(stage.kv_peak_bytes()), std::to_string(stage.steps()),
                    format_seconds(stage.busy_seconds())});
  }
  out += align(rows);
  if (layers) {
    std::vector<Row> layer_rows{{"layer", "stage", "KV used"}};
    for (const api::v1::StageStats& stage : stats.stages()) {
      for (const api::v1::LayerKv& layer : stage.layers()) {
        layer_rows.push_back({std::to_string(layer.layer()), std::to_string(stage.stage()),
                              format_bytes(layer.used_bytes())});
      }
    }
    out += "\n" + align(layer_rows);
  }
  return out;
}

void add_stats_options(CLI::App& app, StatsOptions& options) {
  app.add_flag("--json", options.json, "One JSON object, sizes in bytes");
  app.add_flag("--layers", options.layers, "Also one line per layer");
  add_connection_options(app, options.connection);
}

void add_drain_options(CLI::App& app, DrainOptions& options) {
  app.add_flag("--json", options.json, "One JSON object");
  app.add_flag("--wait", options.wait, "Wait until the server has stopped, at most --timeout");
  add_connection_options(app, options.connection);
}

int run_stats(const StatsOptions& options) {
  Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
  if (!client.ok()) {
    return report_connect_error(client.status(), options.connection);
  }
  const Result<api::v1::Stats> stats = (*client)->stats(options.connection.deadline());
  if (!stats.ok()) {
    print_error(stats.status().message());
    return kExitRequestFailed;
  }
  if (options.json) {
    std::cout << to_json(*stats) << std::endl;
  } else {
    const std::string table = stats_table(*stats, options.layers);
    std::cout << (is_terminal(STDOUT_FILENO) ? printable(table) : table) << std::flush;
  }
  return kExitOk;
}

int run_drain(const DrainOptions& options) {
  Result<std::unique_ptr<api::TcpClient>> client = connect(options.connection);
  if (!client.ok()) {
    return report_connect_error(client.status(), options.connection);
  }
  const Result<api::v1::DrainReply> reply = (*client)->drain(options.connection.deadline());
  if (!reply.ok()) {
    print_error(reply.status().message());
    return kExitRequestFailed;
  }
  if (options.json) {
    std::cout << boost::json::object{{"running_requests", reply->running_requests()}} << std::endl;
  } else {
    std::cout << "draining, " << reply->running_requests() << " requests running" << std::endl;
  }
  if (options.wait) {
    if (const Status status = (*client)->wait_closed(options.connection.deadline()); !status.ok()) {
      print_error(status.message());
      return kExitRequestFailed;
    }
    if (!options.json) {
      std::cout << "stopped" << std::endl;
    }
  }
  return kExitOk;
}

}  // namespace spindle::cli
