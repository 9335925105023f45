#pragma once
// The same metrics under the names that vLLM has for them, for dashboards and alert rules that were
// made for it. Internal to cluster/telemetry.

#include <prometheus/metric_family.h>

#include <string>
#include <vector>

namespace spindle::telemetry {

// Adds a copy of every family that means exactly what one of vLLM's means, under that one's name,
// with the label engine="0" that its samples carry. README.md lists them.
void add_vllm_names(std::vector<prometheus::MetricFamily>& families);

}  // namespace spindle::telemetry
