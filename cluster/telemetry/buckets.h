#pragma once
// Upper bounds of the histograms. Those that vLLM has too are its own, so that its dashboards and
// alert rules fit.

#include <cstdint>
#include <vector>

namespace spindle::telemetry {

using Buckets = std::vector<double>;

Buckets first_token_buckets();  // seconds
Buckets inter_token_buckets();  // seconds
Buckets request_buckets();      // seconds
// 1-2-5 series up to the longest request; 0: up to 500,000.
Buckets token_count_buckets(std::int64_t max_model_len);
Buckets choice_buckets();
Buckets http_duration_buckets();  // seconds
Buckets http_size_buckets();      // bytes

}  // namespace spindle::telemetry
