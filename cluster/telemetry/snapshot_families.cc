#include "cluster/telemetry/snapshot_families.h"

#include <limits>

namespace spindle::telemetry {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

void FamilyBuilder::begin(MetricType type, std::string name, std::string help) {
  MetricFamily family;
  family.name = std::move(name);
  family.help = std::move(help);
  family.type = type;
  families_.push_back(std::move(family));
}

ClientMetric FamilyBuilder::labelled(const Labels& labels) const {
  ClientMetric metric;
  metric.label.reserve(labels.size() + 1);
  metric.label.push_back({"model_name", model_name_});
  metric.label.insert(metric.label.end(), labels.begin(), labels.end());
  return metric;
}

void FamilyBuilder::sample(const Labels& labels, double value) {
  ClientMetric metric = labelled(labels);
  if (families_.back().type == MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  families_.back().metric.push_back(std::move(metric));
}

void FamilyBuilder::counter(std::string name, std::string help, double value) {
  begin(MetricType::Counter, std::move(name), std::move(help));
  sample({}, value);
}

void FamilyBuilder::gauge(std::string name, std::string help, double value) {
  begin(MetricType::Gauge, std::move(name), std::move(help));
  sample({}, value);
}

void FamilyBuilder::histogram(std::string name, std::string help, ClientMetric::Histogram value) {
  begin(MetricType::Histogram, std::move(name), std::move(help));
  ClientMetric metric = labelled({});
  metric.histogram = std::move(value);
  families_.back().metric.push_back(std::move(metric));
}

namespace {

void add_requests(FamilyBuilder& out, const engine::EngineStats& stats) {
  out.counter("spindle_requests_accepted_total",
              "Requests the engine took; the sum of finished, failed, cancelled, running and "
              "waiting.",
              static_cast<double>(stats.accepted));
  out.counter("spindle_requests_finished_total", "Requests that ran to their end.",
              static_cast<double>(stats.finished));
  out.counter("spindle_requests_failed_total", "Requests that the engine could not finish.",
              static_cast<double>(stats.failed));
  out.counter("spindle_requests_cancelled_total",
              "Requests ended early by their client or a drain.",
              static_cast<double>(stats.cancelled));
  out.counter("spindle_requests_expired_total", "Failed requests whose time was up.",
              static_cast<double>(stats.expired));
  out.counter("spindle_num_preemptions_total",
              "Times that a running request gave its KV to another and waited again.",
              static_cast<double>(stats.preemptions));
  out.counter("spindle_recomputed_tokens_total",
              "Tokens that preempted requests had to compute again.",
              static_cast<double>(stats.recomputed_tokens));
  out.gauge("spindle_num_requests_running", "Requests in execution.", stats.running);
  out.gauge("spindle_num_requests_waiting", "Requests queued for their first step.", stats.waiting);
  out.gauge("spindle_num_prompt_tokens_waiting", "Prompt tokens of the queued requests.",
            static_cast<double>(stats.waiting_prompt_tokens));
  out.gauge("spindle_max_num_seqs", "Sequences that may run at the same time.", stats.max_num_seqs);
  out.counter("spindle_prompt_tokens_total",
              "Prompt tokens prefilled; those computed again after a preemption count again.",
              static_cast<double>(stats.prompt_tokens));
  out.counter("spindle_completed_prompt_tokens_total",
              "Prompt tokens of the requests that had their first token, each once.",
              static_cast<double>(stats.completed_prompt_tokens));
  out.counter("spindle_generation_tokens_total", "Tokens sampled.",
              static_cast<double>(stats.generation_tokens));
}

ClientMetric::Histogram step_histogram(const engine::StepTokens& tokens) {
  ClientMetric::Histogram histogram;
  std::uint64_t n = 0;
  for (std::size_t i = 0; i < tokens.counts.size(); ++i) {
    n += tokens.counts[i];
    const double bound = i < engine::kStepTokenBounds.size()
                             ? engine::kStepTokenBounds[i]
                             : std::numeric_limits<double>::infinity();
    histogram.bucket.push_back({n, bound});
  }
  histogram.sample_count = n;
  histogram.sample_sum = static_cast<double>(tokens.sum);
  return histogram;
}

void add_steps(FamilyBuilder& out, const engine::EngineStats& stats) {
  out.counter("spindle_engine_steps_total", "Steps of the engine.",
              static_cast<double>(stats.steps));
  out.histogram("spindle_iteration_tokens", "Tokens that one step computes.",
                step_histogram(stats.step_tokens));
  out.gauge("spindle_micro_batches_in_flight", "Steps on their way through the stages.",
            stats.micro_batches_in_flight);
  out.gauge("spindle_draining", "1 while the engine refuses new requests to stop.",
            stats.draining ? 1 : 0);
}

void add_balancer(FamilyBuilder& out, const engine::EngineStats& stats) {
  out.counter("spindle_kv_budget_plans_total", "Decisions that moved the KV level of a stage.",
              static_cast<double>(stats.budget_plans));
  out.counter("spindle_kv_balancer_rounds_total", "Rounds of reports that the balancer looked at.",
              static_cast<double>(stats.budget_rounds));
  out.counter("spindle_kv_balancer_seconds_total", "Time the balancer took for its decisions.",
              stats.budget_seconds);
  out.gauge("spindle_kv_balancer_wanted_requests",
            "Requests that should run together, by the balancer.", stats.wanted_requests);
  out.gauge("spindle_kv_balancer_fitting_requests",
            "Requests that fit together at the stages' present levels.", stats.fitting_requests);
}

}  // namespace

void add_engine(FamilyBuilder& out, const engine::EngineStats& stats) {
  add_requests(out, stats);
  add_steps(out, stats);
  add_balancer(out, stats);
}

}  // namespace spindle::telemetry
