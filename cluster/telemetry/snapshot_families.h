#pragma once
// Metric families whose values are those of one snapshot of the engine, so that they agree with
// each other at every scrape. Internal to cluster/telemetry.

#include <prometheus/metric_family.h>

#include <string>
#include <utility>
#include <vector>

#include "cluster/engine/engine.h"

namespace spindle::telemetry {

// Collects families; every sample gets the label model_name first. Thread-safety: none.
class FamilyBuilder {
 public:
  using Labels = std::vector<prometheus::ClientMetric::Label>;

  explicit FamilyBuilder(std::string model_name) : model_name_(std::move(model_name)) {}

  void begin(prometheus::MetricType type, std::string name, std::string help);
  // Of the family begun last.
  void sample(const Labels& labels, double value);
  // A family with one sample.
  void counter(std::string name, std::string help, double value);
  void gauge(std::string name, std::string help, double value);
  void histogram(std::string name, std::string help, prometheus::ClientMetric::Histogram value);

  std::vector<prometheus::MetricFamily> take() && { return std::move(families_); }

 private:
  prometheus::ClientMetric labelled(const Labels& labels) const;

  std::string model_name_;
  std::vector<prometheus::MetricFamily> families_;
};

// Counts of requests and tokens, the balancer, steps.
void add_engine(FamilyBuilder& out, const engine::EngineStats& stats);
// One sample or some for each stage, labels stage and device.
void add_stages(FamilyBuilder& out, const engine::EngineStats& stats);

}  // namespace spindle::telemetry
