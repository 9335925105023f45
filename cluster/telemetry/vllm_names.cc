#include "cluster/telemetry/vllm_names.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

namespace spindle::telemetry {
namespace {

struct SameMetric {
  std::string_view ours;
  std::string_view theirs;
};

constexpr std::array kSame{
    SameMetric{"spindle_num_requests_running", "vllm:num_requests_running"},
    SameMetric{"spindle_num_requests_waiting", "vllm:num_requests_waiting"},
    SameMetric{"spindle_kv_cache_usage_perc", "vllm:kv_cache_usage_perc"},
    SameMetric{"spindle_num_preemptions_total", "vllm:num_preemptions_total"},
    // Theirs counts a prompt once, when it is done.
    SameMetric{"spindle_completed_prompt_tokens_total", "vllm:prompt_tokens_total"},
    SameMetric{"spindle_generation_tokens_total", "vllm:generation_tokens_total"},
    SameMetric{"spindle_request_success_total", "vllm:request_success_total"},
    SameMetric{"spindle_iteration_tokens", "vllm:iteration_tokens_total"},
    SameMetric{"spindle_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"},
    SameMetric{"spindle_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"},
    SameMetric{"spindle_request_time_per_output_token_seconds",
               "vllm:request_time_per_output_token_seconds"},
    SameMetric{"spindle_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"},
    SameMetric{"spindle_request_queue_time_seconds", "vllm:request_queue_time_seconds"},
    SameMetric{"spindle_request_inference_time_seconds", "vllm:request_inference_time_seconds"},
    SameMetric{"spindle_request_prefill_time_seconds", "vllm:request_prefill_time_seconds"},
    SameMetric{"spindle_request_decode_time_seconds", "vllm:request_decode_time_seconds"},
    SameMetric{"spindle_request_prompt_tokens", "vllm:request_prompt_tokens"},
    SameMetric{"spindle_request_generation_tokens", "vllm:request_generation_tokens"},
    SameMetric{"spindle_request_max_num_generation_tokens",
               "vllm:request_max_num_generation_tokens"},
    SameMetric{"spindle_request_params_n", "vllm:request_params_n"},
    SameMetric{"spindle_request_params_max_tokens", "vllm:request_params_max_tokens"},
};

}  // namespace

void add_vllm_names(std::vector<prometheus::MetricFamily>& families) {
  std::vector<prometheus::MetricFamily> renamed;
  for (const auto& [ours, theirs] : kSame) {
    const auto found = std::find_if(families.begin(), families.end(),
                                    [&](const auto& family) { return family.name == ours; });
    if (found == families.end()) continue;
    prometheus::MetricFamily family = *found;
    family.name = theirs;
    for (prometheus::ClientMetric& metric : family.metric) {
      metric.label.push_back({"engine", "0"});
    }
    renamed.push_back(std::move(family));
  }
  families.insert(families.end(), std::make_move_iterator(renamed.begin()),
                  std::make_move_iterator(renamed.end()));
}

}  // namespace spindle::telemetry
