#include "cluster/telemetry/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/histogram.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

namespace spindle::telemetry {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;
using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

const Buckets& first_token_buckets() {
  static const Buckets kBuckets{.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
  return kBuckets;
}

const Buckets& inter_token_buckets() {
  static const Buckets kBuckets{.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                                .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
  return kBuckets;
}

const Buckets& request_buckets() {
  static const Buckets kBuckets{.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
  return kBuckets;
}

// 1-2-5 series.
const Buckets& token_count_buckets() {
  static const Buckets kBuckets{1,    2,    5,    10,    20,    50,    100,    200,    500,
                                1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};
  return kBuckets;
}

std::string_view known_method(std::string_view method) {
  static constexpr std::array<std::string_view, 7> kMethods{"GET",     "HEAD",   "POST", "PUT",
                                                            "OPTIONS", "DELETE", "PATCH"};
  const bool known = std::find(kMethods.begin(), kMethods.end(), method) != kMethods.end();
  return known ? method : "other";
}

// "2xx", as the Prometheus middleware of Python servers labels it.
std::string status_class(int status) {
  return status >= 100 && status < 600 ? std::to_string(status / 100) + "xx" : "other";
}

// Builds the families whose values come from an engine snapshot.
class SnapshotFamilies {
 public:
  explicit SnapshotFamilies(std::string model_name) : model_name_(std::move(model_name)) {}

  void add(MetricType type, std::string name, std::string help, double value) {
    begin(type, std::move(name), std::move(help));
    sample({}, value);
  }
  void begin(MetricType type, std::string name, std::string help) {
    MetricFamily family;
    family.name = std::move(name);
    family.help = std::move(help);
    family.type = type;
    families_.push_back(std::move(family));
  }
  void sample(Labels labels, double value) {
    ClientMetric metric;
    metric.label.push_back({"model_name", model_name_});
    metric.label.insert(metric.label.end(), labels.begin(), labels.end());
    if (families_.back().type == MetricType::Counter) {
      metric.counter.value = value;
    } else {
      metric.gauge.value = value;
    }
    families_.back().metric.push_back(std::move(metric));
  }
  std::vector<MetricFamily> take() && { return std::move(families_); }

 private:
  std::string model_name_;
  std::vector<MetricFamily> families_;
};

void add_request_counts(SnapshotFamilies& out, const engine::EngineStats& stats) {
  const auto counter = MetricType::Counter;
  const auto gauge = MetricType::Gauge;
  out.add(counter, "spindle_requests_accepted_total",
          "Requests the engine took; the sum of finished, failed, cancelled, running and waiting.",
          static_cast<double>(stats.accepted));
  out.add(counter, "spindle_requests_finished_total", "Requests that ran to their end.",
          static_cast<double>(stats.finished));
  out.add(counter, "spindle_requests_failed_total", "Requests that the engine could not finish.",
          static_cast<double>(stats.failed));
  out.add(counter, "spindle_requests_cancelled_total",
          "Requests ended early by their client or a drain.", static_cast<double>(stats.cancelled));
  out.add(counter, "spindle_requests_expired_total", "Failed requests whose time was up.",
          static_cast<double>(stats.expired));
  out.add(counter, "spindle_num_preemptions_total",
          "Times that a running request gave its KV to another and waited again.",
          static_cast<double>(stats.preemptions));
  out.add(counter, "spindle_recomputed_tokens_total",
          "Tokens that preempted requests had to compute again.",
          static_cast<double>(stats.recomputed_tokens));
  out.add(gauge, "spindle_num_requests_running", "Requests in execution.", stats.running);
  out.add(gauge, "spindle_num_requests_waiting", "Requests queued for their first step.",
          stats.waiting);
  out.add(gauge, "spindle_num_prompt_tokens_waiting", "Prompt tokens of the queued requests.",
          static_cast<double>(stats.waiting_prompt_tokens));
  out.add(counter, "spindle_prompt_tokens_total", "Prompt tokens prefilled.",
          static_cast<double>(stats.prompt_tokens));
  out.add(counter, "spindle_generation_tokens_total", "Tokens sampled.",
          static_cast<double>(stats.generation_tokens));
  out.add(counter, "spindle_engine_steps_total", "Steps of the engine.",
          static_cast<double>(stats.steps));
  out.add(counter, "spindle_kv_budget_plans_total", "Decisions that moved the KV level of a stage.",
          static_cast<double>(stats.budget_plans));
  out.add(counter, "spindle_kv_balancer_seconds_total", "Time the balancer took for its decisions.",
          stats.budget_seconds);
  out.add(gauge, "spindle_kv_balancer_wanted_requests",
          "Requests that should run together, by the balancer.", stats.wanted_requests);
  out.add(gauge, "spindle_kv_balancer_fitting_requests",
          "Requests that fit together at the stages' present levels.", stats.fitting_requests);
  out.add(gauge, "spindle_draining", "1 while the engine refuses new requests to stop.",
          stats.draining ? 1 : 0);
}

template <typename Value>
void add_per_stage(SnapshotFamilies& out, const engine::EngineStats& stats, MetricType type,
                   std::string name, std::string help, Value value) {
  out.begin(type, std::move(name), std::move(help));
  for (const engine::StageState& stage : stats.stages) {
    out.sample({{"stage", std::to_string(stage.stage)}, {"device", stage.device}},
               static_cast<double>(value(stage)));
  }
}

void add_stages(SnapshotFamilies& out, const engine::EngineStats& stats) {
  using Stage = engine::StageState;
  const auto counter = MetricType::Counter;
  const auto gauge = MetricType::Gauge;
  // The tightest stage limits admission, so the fullest pool is the cluster's usage.
  double usage = 0;
  for (const Stage& stage : stats.stages) {
    if (stage.kv_capacity_bytes == 0) continue;
    usage = std::max(usage, static_cast<double>(stage.kv_used_bytes) /
                                static_cast<double>(stage.kv_capacity_bytes));
  }
  out.add(gauge, "spindle_kv_cache_usage_perc", "Used share (0-1) of the fullest stage's KV pool.",
          usage);
  add_per_stage(out, stats, gauge, "spindle_kv_capacity_bytes", "Size of the stage's KV pool.",
                [](const Stage& s) { return s.kv_capacity_bytes; });
  add_per_stage(out, stats, gauge, "spindle_kv_used_bytes", "KV bytes held by the stage.",
                [](const Stage& s) { return s.kv_used_bytes; });
  add_per_stage(out, stats, gauge, "spindle_kv_peak_bytes", "Most KV bytes the stage ever held.",
                [](const Stage& s) { return s.kv_peak_bytes; });
  add_per_stage(out, stats, gauge, "spindle_kv_committed_bytes",
                "KV bytes that the ledger has promised to running requests and sessions.",
                [](const Stage& s) { return s.kv_committed_bytes; });
  add_per_stage(out, stats, gauge, "spindle_kv_level_ratio",
                "Share of the uncompressed bytes that the stage's layers are planned for where a "
                "request asked for no size; 0 without a balancer.",
                [](const Stage& s) { return s.kv_level_ratio; });
  add_per_stage(out, stats, gauge, "spindle_kv_price",
                "Expected error for a byte of the stage's KV; 0 where memory does not bind.",
                [](const Stage& s) { return s.kv_price; });
  add_per_stage(out, stats, gauge, "spindle_weight_bytes", "Weights of the stage's layers.",
                [](const Stage& s) { return s.weight_bytes; });
  add_per_stage(out, stats, counter, "spindle_stage_busy_seconds_total",
                "Time the stage spent computing.", [](const Stage& s) { return s.busy_seconds; });
  add_per_stage(out, stats, counter, "spindle_stage_steps_total", "Steps the stage has run.",
                [](const Stage& s) { return s.steps; });
}

}  // namespace

struct Metrics::Families {
  using Counter = prometheus::Counter;
  using Histogram = prometheus::Histogram;

  explicit Families(std::string model)
      : model_name(std::move(model)),
        labels{{"model_name", model_name}},
        first_token(histogram("spindle_time_to_first_token_seconds",
                              "Arrival of a request to its first token.", first_token_buckets())),
        inter_token(histogram("spindle_inter_token_latency_seconds",
                              "Between successive tokens of one choice.", inter_token_buckets())),
        e2e(histogram("spindle_e2e_request_latency_seconds", "Submit to end of a request.",
                      request_buckets())),
        queue(histogram("spindle_request_queue_time_seconds", "Submit to first step.",
                        request_buckets())),
        prompt_tokens(histogram("spindle_request_prompt_tokens", "Prompt tokens of a request.",
                                token_count_buckets())),
        generation_tokens(histogram("spindle_request_generation_tokens",
                                    "Generated tokens of a request, over all choices.",
                                    token_count_buckets())),
        http_requests(prometheus::BuildCounter()
                          .Name("spindle_http_requests_total")
                          .Help("HTTP responses by route, method and status class.")
                          .Register(registry)) {
    auto& refused_family = prometheus::BuildCounter()
                               .Name("spindle_requests_refused_total")
                               .Help("Requests turned away before they ran.")
                               .Labels(labels)
                               .Register(registry);
    for (const char* reason : {"invalid", "queue_full", "unavailable"}) {
      refused.push_back(&refused_family.Add({{"reason", reason}}));
    }
    auto& success_family = prometheus::BuildCounter()
                               .Name("spindle_request_success_total")
                               .Help("Choices by the reason they ended.")
                               .Labels(labels)
                               .Register(registry);
    for (const char* reason : {"stop", "length", "abort", "error"}) {
      finished.push_back(&success_family.Add({{"finished_reason", reason}}));
    }
  }

  Histogram& histogram(const char* name, const char* help, const Buckets& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Labels(labels).Register(registry).Add(
        {}, buckets);
  }

  prometheus::Registry registry;
  std::string model_name;
  prometheus::Labels labels;
  Histogram& first_token;
  Histogram& inter_token;
  Histogram& e2e;
  Histogram& queue;
  Histogram& prompt_tokens;
  Histogram& generation_tokens;
  prometheus::Family<Counter>& http_requests;
  std::vector<Counter*> refused;   // by RefusalReason
  std::vector<Counter*> finished;  // by FinishedReason
};

Metrics::Metrics(std::string model_name)
    : families_(std::make_unique<Families>(std::move(model_name))) {}

Metrics::~Metrics() = default;

void Metrics::count_refused(RefusalReason reason) {
  families_->refused[static_cast<std::size_t>(reason)]->Increment();
}

void Metrics::count_finished_choice(FinishedReason reason) {
  families_->finished[static_cast<std::size_t>(reason)]->Increment();
}

void Metrics::observe_time_to_first_token(double seconds) {
  families_->first_token.Observe(seconds);
}

void Metrics::observe_inter_token_latency(double seconds) {
  families_->inter_token.Observe(seconds);
}

void Metrics::observe_request(double e2e_seconds, double queue_seconds, std::int64_t prompt_tokens,
                              std::int64_t generation_tokens) {
  families_->e2e.Observe(e2e_seconds);
  families_->queue.Observe(queue_seconds);
  families_->prompt_tokens.Observe(static_cast<double>(prompt_tokens));
  families_->generation_tokens.Observe(static_cast<double>(generation_tokens));
}

void Metrics::count_http_request(std::string_view handler, std::string_view method, int status) {
  families_->http_requests
      .Add({{"handler", std::string(handler)},
            {"method", std::string(known_method(method))},
            {"status", status_class(status)}})
      .Increment();
}

Latencies Metrics::latencies() const {
  const auto counts = [](const prometheus::Histogram& histogram) {
    LatencyCounts out;
    const prometheus::ClientMetric::Histogram now = histogram.Collect().histogram;
    for (const prometheus::ClientMetric::Bucket& bucket : now.bucket) {
      if (!std::isinf(bucket.upper_bound)) out.bounds.push_back(bucket.upper_bound);
      out.counts.push_back(bucket.cumulative_count);
    }
    out.sum = now.sample_sum;
    return out;
  };
  return {.time_to_first_token = counts(families_->first_token),
          .inter_token = counts(families_->inter_token),
          .e2e = counts(families_->e2e)};
}

std::string Metrics::render(const engine::EngineStats& stats) const {
  SnapshotFamilies snapshot(families_->model_name);
  add_request_counts(snapshot, stats);
  add_stages(snapshot, stats);
  std::vector<MetricFamily> all = std::move(snapshot).take();
  std::vector<MetricFamily> counted = families_->registry.Collect();
  all.insert(all.end(), std::make_move_iterator(counted.begin()),
             std::make_move_iterator(counted.end()));
  return prometheus::TextSerializer().Serialize(all);
}

}  // namespace spindle::telemetry
