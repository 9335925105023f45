#pragma once
// What a run of `spindle bench` measured, from what happened to each request. The definitions and
// the names in the JSON are those of `vllm bench serve`.

#include <boost/json.hpp>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::cli {

// A piece of output as it came in.
struct BenchOutput {
  double at = 0;  // seconds from the start of the run
  std::int32_t n_tokens = 0;
};

// One request; times in seconds from the start of the run.
struct BenchRecord {
  double due = 0;   // when it was to be sent
  double sent = 0;  // later than `due` when it waited for a place among the concurrent ones
  double ended = 0;
  std::vector<BenchOutput> outputs;
  std::int32_t prompt_tokens = 0;
  std::int32_t output_tokens = 0;
  std::string text;
  std::string error;  // empty: it succeeded; a stream that ended in an error did not
};

enum class BenchMetric : std::uint8_t { kTtft, kTpot, kItl, kE2el };
// "ttft", "tpot", "itl", "e2el".
std::string_view metric_name(BenchMetric metric);
std::optional<BenchMetric> metric_of(std::string_view name);

// A request is good when none of its values is above the limit: "ttft:200" in milliseconds.
struct BenchGoal {
  BenchMetric metric = BenchMetric::kTtft;
  double limit_ms = 0;
};
// INVALID_ARGUMENT for other metrics than ttft, tpot and e2el, and for what is no number above 0.
Result<BenchGoal> parse_goal(std::string_view text);

struct BenchSummaryOptions {
  std::vector<BenchMetric> metrics = {BenchMetric::kTtft, BenchMetric::kTpot, BenchMetric::kItl};
  std::vector<double> percentiles = {99};  // in [0, 100]
  std::vector<BenchGoal> goals;
};

struct BenchStatistics {
  double mean = 0;
  double median = 0;
  double std = 0;                   // of the population
  std::vector<double> percentiles;  // as the options list them, linear between ranks
};
BenchStatistics statistics_of(std::vector<double> values, const std::vector<double>& percentiles);

struct BenchSummary {
  double duration = 0;
  std::size_t completed = 0;
  std::size_t failed = 0;
  std::int64_t total_input_tokens = 0;  // of the completed ones, as the next three
  std::int64_t total_output_tokens = 0;
  double request_throughput = 0;  // per second
  double output_throughput = 0;
  double total_token_throughput = 0;
  std::optional<double> request_goodput;  // when there are goals
  double max_output_tokens_per_s = 0;     // in one second of the run
  std::size_t max_concurrent_requests = 0;
  std::vector<BenchStatistics> statistics;  // in milliseconds, as the options list the metrics
};

// Times of one completed request, in milliseconds: TTFT from sending to the first output; TPOT the
// time after it per further token, none for answers of one token; E2EL from sending to the end.
double ttft_ms(const BenchRecord& record);
std::optional<double> tpot_ms(const BenchRecord& record);
double e2el_ms(const BenchRecord& record);

BenchSummary summarize(const std::vector<BenchRecord>& records, double duration,
                       const BenchSummaryOptions& options);

// The result object; `detailed` adds a list per request of each value.
boost::json::object to_json(const BenchSummary& summary, const BenchSummaryOptions& options);
void add_details(boost::json::object& result, const std::vector<BenchRecord>& records);

// The printed report.
std::string report_text(const BenchSummary& summary, const BenchSummaryOptions& options,
                        double request_rate, std::size_t max_concurrency);

}  // namespace spindle::cli
