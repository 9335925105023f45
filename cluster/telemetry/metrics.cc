#include "cluster/telemetry/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "cluster/telemetry/buckets.h"
#include "cluster/telemetry/process_start.h"
#include "cluster/telemetry/snapshot_families.h"
#include "cluster/telemetry/vllm_names.h"

namespace spindle::telemetry {
namespace {

using prometheus::MetricFamily;

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

}  // namespace

struct Metrics::Families {
  using Counter = prometheus::Counter;
  using Histogram = prometheus::Histogram;
  using HistogramFamily = prometheus::Family<Histogram>;

  explicit Families(MetricsOptions metrics_options)
      : options(std::move(metrics_options)),
        labels{{"model_name", options.model_name}},
        token_buckets(token_count_buckets(options.max_model_len)),
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
    add_infos();
  }

  // What does not change while the process lives.
  void add_infos() {
    prometheus::BuildGauge()
        .Name("spindle_build_info")
        .Help("The server's version; always 1.")
        .Register(registry)
        .Add({{"version", options.version}, {"model_name", options.model_name}})
        .Set(1);
    prometheus::BuildGauge()
        .Name("spindle_process_start_time_seconds")
        .Help("Unix time at which the process of rank 0 began.")
        .Labels(labels)
        .Register(registry)
        .Add({})
        .Set(process_start_seconds());
    prometheus::Labels config(options.cache_config.begin(), options.cache_config.end());
    prometheus::BuildGauge()
        .Name("spindle_cache_config_info")
        .Help("How the KV cache is configured; always 1.")
        .Labels(labels)
        .Register(registry)
        .Add(config)
        .Set(1);
  }

  Histogram& histogram(const char* name, const char* help, const Buckets& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Labels(labels).Register(registry).Add(
        {}, buckets);
  }
  HistogramFamily& http_histogram(const char* name, const char* help) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
  }

  prometheus::Registry registry;
  const MetricsOptions options;
  const prometheus::Labels labels;
  const Buckets token_buckets;
  const Buckets duration_buckets = http_duration_buckets();
  const Buckets size_buckets = http_size_buckets();

  Histogram& first_token =
      histogram("spindle_time_to_first_token_seconds", "Arrival of a request to its first token.",
                first_token_buckets());
  Histogram& inter_token =
      histogram("spindle_inter_token_latency_seconds", "Between successive tokens of one choice.",
                inter_token_buckets());
  Histogram& token_mean =
      histogram("spindle_request_time_per_output_token_seconds",
                "Mean time between a request's tokens; 0 for a single one.", inter_token_buckets());
  Histogram& e2e = histogram("spindle_e2e_request_latency_seconds", "Arrival to end of a request.",
                             request_buckets());
  Histogram& queue =
      histogram("spindle_request_queue_time_seconds", "Submit to first step.", request_buckets());
  Histogram& prefill = histogram("spindle_request_prefill_time_seconds",
                                 "First step to first token.", request_buckets());
  Histogram& decode = histogram("spindle_request_decode_time_seconds", "First token to last token.",
                                request_buckets());
  Histogram& inference = histogram("spindle_request_inference_time_seconds",
                                   "First step to last token.", request_buckets());
  Histogram& prompt_tokens =
      histogram("spindle_request_prompt_tokens", "Prompt tokens of a request.", token_buckets);
  Histogram& generation_tokens =
      histogram("spindle_request_generation_tokens",
                "Generated tokens of a request, over all choices.", token_buckets);
  Histogram& longest_generation =
      histogram("spindle_request_max_num_generation_tokens",
                "Generated tokens of a request's longest choice.", token_buckets);
  Histogram& params_n =
      histogram("spindle_request_params_n", "Choices that a request asked for.", choice_buckets());
  Histogram& params_max_tokens =
      histogram("spindle_request_params_max_tokens",
                "Tokens that each choice of a request may have.", token_buckets);
  HistogramFamily& http_seconds =
      http_histogram("spindle_http_request_duration_seconds",
                     "From an HTTP request's last byte to the last of its answer.");
  HistogramFamily& http_request_bytes =
      http_histogram("spindle_http_request_size_bytes", "Bodies of HTTP requests.");
  HistogramFamily& http_response_bytes =
      http_histogram("spindle_http_response_size_bytes", "HTTP answers, head and body.");
  prometheus::Family<Counter>& http_requests;
  std::vector<Counter*> refused;   // by RefusalReason
  std::vector<Counter*> finished;  // by FinishedReason
};

Metrics::Metrics(MetricsOptions options)
    : families_(std::make_unique<Families>(std::move(options))) {}

Metrics::Metrics(std::string model_name)
    : Metrics(MetricsOptions{.model_name = std::move(model_name), .version = {}}) {}

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

void Metrics::observe_request(const RequestTimes& request) {
  Families& f = *families_;
  f.e2e.Observe(request.e2e_seconds);
  f.queue.Observe(request.queue_seconds);
  f.prefill.Observe(request.prefill_seconds);
  f.decode.Observe(request.decode_seconds);
  f.inference.Observe(request.prefill_seconds + request.decode_seconds);
  const std::int64_t n_gaps = request.generation_tokens - 1;
  f.token_mean.Observe(n_gaps > 0 ? request.decode_seconds / static_cast<double>(n_gaps) : 0);
  f.prompt_tokens.Observe(static_cast<double>(request.prompt_tokens));
  f.generation_tokens.Observe(static_cast<double>(request.generation_tokens));
  f.longest_generation.Observe(static_cast<double>(request.longest_generation_tokens));
  f.params_n.Observe(static_cast<double>(request.n_choices));
  f.params_max_tokens.Observe(static_cast<double>(request.max_tokens));
}

void Metrics::count_http_request(std::string_view handler, std::string_view method, int status) {
  families_->http_requests
      .Add({{"handler", std::string(handler)},
            {"method", std::string(known_method(method))},
            {"status", status_class(status)}})
      .Increment();
}

void Metrics::observe_http_request(std::string_view handler, const HttpTimes& request) {
  const prometheus::Labels labels{{"handler", std::string(handler)}};
  Families& f = *families_;
  f.http_seconds.Add(labels, f.duration_buckets).Observe(request.seconds);
  f.http_request_bytes.Add(labels, f.size_buckets)
      .Observe(static_cast<double>(request.request_bytes));
  f.http_response_bytes.Add(labels, f.size_buckets)
      .Observe(static_cast<double>(request.response_bytes));
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
  FamilyBuilder snapshot(families_->options.model_name);
  add_engine(snapshot, stats);
  add_stages(snapshot, stats);
  std::vector<MetricFamily> all = std::move(snapshot).take();
  std::vector<MetricFamily> counted = families_->registry.Collect();
  all.insert(all.end(), std::make_move_iterator(counted.begin()),
             std::make_move_iterator(counted.end()));
  if (families_->options.vllm_names) add_vllm_names(all);
  return prometheus::TextSerializer().Serialize(all);
}

}  // namespace spindle::telemetry
