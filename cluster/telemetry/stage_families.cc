// What /metrics says of each stage.

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "cluster/telemetry/snapshot_families.h"
#include "kvstore/plan/kv_kind.h"

namespace spindle::telemetry {
namespace {

using engine::StageState;
using prometheus::MetricType;
using Label = prometheus::ClientMetric::Label;

FamilyBuilder::Labels labels_of(const StageState& stage) {
  return {{"stage", std::to_string(stage.stage)}, {"device", stage.device}};
}

FamilyBuilder::Labels labels_of(const StageState& stage, Label more) {
  FamilyBuilder::Labels labels = labels_of(stage);
  labels.push_back(std::move(more));
  return labels;
}

double ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

// One sample for each stage.
template <typename Value>
void add(FamilyBuilder& out, const engine::EngineStats& stats, MetricType type, std::string name,
         std::string help, Value value) {
  out.begin(type, std::move(name), std::move(help));
  for (const StageState& stage : stats.stages) {
    out.sample(labels_of(stage), static_cast<double>(value(stage)));
  }
}

template <typename Value>
void add_gauge(FamilyBuilder& out, const engine::EngineStats& stats, std::string name,
               std::string help, Value value) {
  add(out, stats, MetricType::Gauge, std::move(name), std::move(help), value);
}

template <typename Value>
void add_counter(FamilyBuilder& out, const engine::EngineStats& stats, std::string name,
                 std::string help, Value value) {
  add(out, stats, MetricType::Counter, std::move(name), std::move(help), value);
}

void add_pools(FamilyBuilder& out, const engine::EngineStats& stats) {
  // The tightest stage limits admission, so the fullest pool is the cluster's usage.
  double usage = 0;
  for (const StageState& s : stats.stages) {
    usage = std::max(usage, ratio(static_cast<double>(s.kv_used_bytes),
                                  static_cast<double>(s.kv_capacity_bytes)));
  }
  out.gauge("spindle_kv_cache_usage_perc", "Used share (0-1) of the fullest stage's KV pool.",
            usage);
  add_gauge(out, stats, "spindle_weight_bytes", "Weights of the stage's layers.",
            [](const StageState& s) { return s.weight_bytes; });
  add_gauge(out, stats, "spindle_kv_capacity_bytes", "Size of the stage's KV pool.",
            [](const StageState& s) { return s.kv_capacity_bytes; });
  add_gauge(out, stats, "spindle_kv_used_bytes", "KV bytes held by the stage.",
            [](const StageState& s) { return s.kv_used_bytes; });
  add_gauge(out, stats, "spindle_kv_peak_bytes", "Most KV bytes the stage ever held.",
            [](const StageState& s) { return s.kv_peak_bytes; });
  add_gauge(out, stats, "spindle_kv_committed_bytes",
            "KV bytes that the ledger has promised to running requests and sessions.",
            [](const StageState& s) { return s.kv_committed_bytes; });
  add_gauge(out, stats, "spindle_kv_pressure_ratio",
            "Committed share (0-1) of the stage's KV pool.", [](const StageState& s) {
              return ratio(static_cast<double>(s.kv_committed_bytes),
                           static_cast<double>(s.kv_capacity_bytes));
            });
}

void add_budgets(FamilyBuilder& out, const engine::EngineStats& stats) {
  add_gauge(out, stats, "spindle_kv_budget_bytes",
            "KV bytes that the balancer plans for the requests that should run together, at the "
            "stage's present level; the pool's size without a balancer.",
            [](const StageState& s) { return s.kv_budget_bytes; });
  add_gauge(out, stats, "spindle_kv_level_ratio",
            "Share of the uncompressed bytes that the stage's layers are planned for where a "
            "request asked for no size; 0 without a balancer.",
            [](const StageState& s) { return s.kv_level_ratio; });
  add_gauge(out, stats, "spindle_kv_price",
            "Expected error for a byte of the stage's KV; 0 where memory does not bind.",
            [](const StageState& s) { return s.kv_price; });
  out.begin(MetricType::Counter, "spindle_kv_budget_moves_total",
            "Times that the balancer changed the stage's level, to compress stronger or lighter.");
  for (const StageState& stage : stats.stages) {
    out.sample(labels_of(stage, {"direction", "stronger"}),
               static_cast<double>(stage.kv_moves_stronger));
    out.sample(labels_of(stage, {"direction", "lighter"}),
               static_cast<double>(stage.kv_moves_lighter));
  }
}

// What the layers hold; stages that have not reported yet hold nothing.
void add_contents(FamilyBuilder& out, const engine::EngineStats& stats) {
  add_gauge(out, stats, "spindle_kv_full_bytes",
            "What the stage's logical tokens would take uncompressed in 16 bit.",
            [](const StageState& stage) {
              std::uint64_t bytes = 0;
              for (const engine::LayerState& layer : stage.layers) bytes += layer.full_bytes;
              return bytes;
            });
  out.begin(MetricType::Gauge, "spindle_kv_tokens",
            "Tokens of all sequences in the stage's cache, mean of its layers: seen (logical), and "
            "kept in whatever form (retained).");
  for (const StageState& stage : stats.stages) {
    double logical = 0;
    double retained = 0;
    for (const engine::LayerState& layer : stage.layers) {
      logical += static_cast<double>(layer.logical_tokens);
      retained += static_cast<double>(layer.retained_tokens);
    }
    const auto n_layers = static_cast<double>(stage.layers.size());
    out.sample(labels_of(stage, {"kind", "logical"}), ratio(logical, n_layers));
    out.sample(labels_of(stage, {"kind", "retained"}), ratio(retained, n_layers));
  }
  out.begin(MetricType::Gauge, "spindle_kv_stored_bytes",
            "KV bytes of the stage's layers by the form they lie in.");
  for (const StageState& stage : stats.stages) {
    for (std::size_t form = 0; form < engine::kKvForms; ++form) {
      out.sample(labels_of(stage, {"repr", std::string(engine::kKvFormNames[form])}),
                 static_cast<double>(stage.kv_form_bytes[form]));
    }
  }
  out.begin(MetricType::Gauge, "spindle_kv_layers",
            "Layers of the stage by the plan that most of their KV is under; none: they hold "
            "nothing.");
  for (const StageState& stage : stats.stages) {
    std::map<std::string, int> layers;
    for (const engine::LayerState& layer : stage.layers) {
      const std::string group = kvstore::plan_group_name(kvstore::parse_plan_kind_name(layer.plan));
      ++layers[group.empty() ? "none" : group];
    }
    if (stage.layers.empty()) layers["none"] = stage.n_layers;
    for (const auto& [group, n] : layers) out.sample(labels_of(stage, {"policy", group}), n);
  }
}

void add_times(FamilyBuilder& out, const engine::EngineStats& stats) {
  add_counter(out, stats, "spindle_stage_steps_total", "Steps the stage has run.",
              [](const StageState& s) { return s.steps; });
  add_counter(out, stats, "spindle_stage_busy_seconds_total", "Time the stage spent computing.",
              [](const StageState& s) { return s.busy_seconds; });
  out.begin(MetricType::Counter, "spindle_stage_bubble_seconds_total",
            "Time the stage did not compute while there were requests: it had no step plan "
            "(empty), waited for activations (upstream), or for the next stage to take its own "
            "(downstream).");
  for (const StageState& stage : stats.stages) {
    out.sample(labels_of(stage, {"cause", "empty"}), stage.bubble.empty);
    out.sample(labels_of(stage, {"cause", "upstream"}), stage.bubble.upstream);
    out.sample(labels_of(stage, {"cause", "downstream"}), stage.bubble.downstream);
  }
  out.begin(MetricType::Counter, "spindle_stage_transfer_seconds_total",
            "Time that moving activations took, from the moment the other side was there.");
  for (const StageState& stage : stats.stages) {
    out.sample(labels_of(stage, {"op", "send"}), stage.send_seconds);
    out.sample(labels_of(stage, {"op", "receive"}), stage.receive_seconds);
  }
  add_counter(out, stats, "spindle_stage_compress_seconds_total",
              "Time the stage scored and compressed KV at boundaries.",
              [](const StageState& s) { return s.compress_seconds; });
  add_gauge(out, stats, "spindle_worker_last_report_seconds",
            "Time since the stage last reported a step; without requests it has none to report.",
            [](const StageState& s) { return s.report_age_seconds; });
}

}  // namespace

void add_stages(FamilyBuilder& out, const engine::EngineStats& stats) {
  add_pools(out, stats);
  add_budgets(out, stats);
  add_contents(out, stats);
  add_times(out, stats);
}

}  // namespace spindle::telemetry
