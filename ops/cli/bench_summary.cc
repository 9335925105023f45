#include "ops/cli/bench_summary.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>
#include <utility>

namespace spindle::cli {
namespace {

namespace json = boost::json;

struct MetricNames {
  BenchMetric metric;
  std::string_view key;
  std::string_view label;
  std::string_view title;
};
constexpr std::array kMetrics = {
    MetricNames{BenchMetric::kTtft, "ttft", "TTFT", "Time to First Token"},
    MetricNames{BenchMetric::kTpot, "tpot", "TPOT", "Time per Output Token (excl. 1st token)"},
    MetricNames{BenchMetric::kItl, "itl", "ITL", "Inter-token Latency"},
    MetricNames{BenchMetric::kE2el, "e2el", "E2EL", "End-to-end Latency"}};

const MetricNames& names_of(BenchMetric metric) {
  return *std::find_if(kMetrics.begin(), kMetrics.end(),
                       [&](const MetricNames& names) { return names.metric == metric; });
}

bool succeeded(const BenchRecord& record) { return record.error.empty(); }

std::vector<double> gaps_ms(const BenchRecord& record) {
  std::vector<double> gaps;
  for (std::size_t i = 1; i < record.outputs.size(); ++i) {
    gaps.push_back((record.outputs[i].at - record.outputs[i - 1].at) * 1e3);
  }
  return gaps;
}

std::vector<double> values_of(const std::vector<BenchRecord>& records, BenchMetric metric) {
  std::vector<double> values;
  for (const BenchRecord& record : records) {
    if (!succeeded(record)) continue;
    switch (metric) {
      case BenchMetric::kTtft:
        values.push_back(ttft_ms(record));
        break;
      case BenchMetric::kTpot:
        if (const auto value = tpot_ms(record)) values.push_back(*value);
        break;
      case BenchMetric::kItl: {
        const std::vector<double> gaps = gaps_ms(record);
        values.insert(values.end(), gaps.begin(), gaps.end());
        break;
      }
      case BenchMetric::kE2el:
        values.push_back(e2el_ms(record));
        break;
    }
  }
  return values;
}

bool is_good(const BenchRecord& record, const std::vector<BenchGoal>& goals) {
  return std::all_of(goals.begin(), goals.end(), [&](const BenchGoal& goal) {
    switch (goal.metric) {
      case BenchMetric::kTtft:
        return ttft_ms(record) <= goal.limit_ms;
      case BenchMetric::kTpot:
        return tpot_ms(record).value_or(0) <= goal.limit_ms;
      default:
        return e2el_ms(record) <= goal.limit_ms;
    }
  });
}

double peak_tokens_per_second(const std::vector<BenchRecord>& records) {
  std::map<std::int64_t, std::int64_t> tokens;
  for (const BenchRecord& record : records) {
    if (!succeeded(record)) continue;
    for (const BenchOutput& output : record.outputs) {
      tokens[static_cast<std::int64_t>(std::floor(output.at))] += output.n_tokens;
    }
  }
  std::int64_t peak = 0;
  for (const auto& [second, n] : tokens) peak = std::max(peak, n);
  return static_cast<double>(peak);
}

std::size_t peak_concurrency(const std::vector<BenchRecord>& records) {
  std::vector<std::pair<double, int>> changes;
  for (const BenchRecord& record : records) {
    changes.emplace_back(record.sent, 1);
    changes.emplace_back(record.ended, -1);
  }
  std::sort(changes.begin(), changes.end());  // at one time ends come first
  std::int64_t now = 0;
  std::int64_t peak = 0;
  for (const auto& [at, change] : changes) {
    now += change;
    peak = std::max(peak, now);
  }
  return static_cast<std::size_t>(peak);
}

// "99", "99.9".
std::string percentile_text(double percentile) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", percentile);
  return text;
}

std::string line(const std::string& label, const std::string& value) {
  std::string text = label;
  text.resize(std::max<std::size_t>(label.size() + 1, 41), ' ');
  return text + value + "\n";
}
std::string line(const std::string& label, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.2f", value);
  return line(label, std::string(text));
}
std::string line(const std::string& label, std::size_t value) {
  return line(label, std::to_string(value));
}
std::string heading(std::string_view text, char fill) {
  constexpr std::size_t kWidth = 50;
  const std::size_t room = kWidth > text.size() + 2 ? kWidth - text.size() - 2 : 0;
  return std::string(room / 2, fill) + " " + std::string(text) + " " +
         std::string(room - room / 2, fill) + "\n";
}

template <typename F>
json::array list(const std::vector<BenchRecord>& records, const F& value) {
  json::array out;
  for (const BenchRecord& record : records) out.push_back(value(record));
  return out;
}

}  // namespace

std::string_view metric_name(BenchMetric metric) { return names_of(metric).key; }

std::optional<BenchMetric> metric_of(std::string_view name) {
  for (const MetricNames& names : kMetrics) {
    if (names.key == name) return names.metric;
  }
  return std::nullopt;
}

Result<BenchGoal> parse_goal(std::string_view text) {
  const std::size_t colon = text.find(':');
  const auto metric = metric_of(text.substr(0, colon));
  if (colon == std::string_view::npos || !metric || *metric == BenchMetric::kItl) {
    return invalid_argument("--goodput takes ttft:MS, tpot:MS or e2el:MS, not '" +
                            std::string(text) + "'");
  }
  const std::string_view number = text.substr(colon + 1);
  BenchGoal goal{.metric = *metric, .limit_ms = 0};
  const auto [end, error] =
      std::from_chars(number.data(), number.data() + number.size(), goal.limit_ms);
  if (error != std::errc{} || end != number.data() + number.size() || !(goal.limit_ms > 0) ||
      !std::isfinite(goal.limit_ms)) {
    return invalid_argument("--goodput " + std::string(text) + ": not a number of milliseconds");
  }
  return goal;
}

double ttft_ms(const BenchRecord& record) {
  return record.outputs.empty() ? 0 : (record.outputs.front().at - record.sent) * 1e3;
}
std::optional<double> tpot_ms(const BenchRecord& record) {
  if (record.output_tokens < 2 || record.outputs.empty()) return std::nullopt;
  return (e2el_ms(record) - ttft_ms(record)) / (record.output_tokens - 1);
}
double e2el_ms(const BenchRecord& record) { return (record.ended - record.sent) * 1e3; }

BenchStatistics statistics_of(std::vector<double> values, const std::vector<double>& percentiles) {
  BenchStatistics out;
  out.percentiles.assign(percentiles.size(), 0.0);
  if (values.empty()) return out;
  std::sort(values.begin(), values.end());
  const auto n = static_cast<double>(values.size());
  const auto at = [&](double percentile) {
    const double rank = percentile / 100 * (n - 1);
    const auto below = static_cast<std::size_t>(rank);
    const std::size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (values[above] - values[below]) * (rank - static_cast<double>(below));
  };
  out.mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double value : values) squares += (value - out.mean) * (value - out.mean);
  out.std = std::sqrt(squares / n);
  out.median = at(50);
  for (std::size_t i = 0; i < percentiles.size(); ++i) out.percentiles[i] = at(percentiles[i]);
  return out;
}

BenchSummary summarize(const std::vector<BenchRecord>& records, double duration,
                       const BenchSummaryOptions& options) {
  BenchSummary out;
  out.duration = duration;
  std::size_t good = 0;
  for (const BenchRecord& record : records) {
    if (!succeeded(record)) {
      ++out.failed;
      continue;
    }
    ++out.completed;
    out.total_input_tokens += record.prompt_tokens;
    out.total_output_tokens += record.output_tokens;
    if (is_good(record, options.goals)) ++good;
  }
  const double seconds = std::max(duration, 1e-9);
  out.request_throughput = static_cast<double>(out.completed) / seconds;
  out.output_throughput = static_cast<double>(out.total_output_tokens) / seconds;
  out.total_token_throughput =
      static_cast<double>(out.total_input_tokens + out.total_output_tokens) / seconds;
  if (!options.goals.empty()) out.request_goodput = static_cast<double>(good) / seconds;
  out.max_output_tokens_per_s = peak_tokens_per_second(records);
  out.max_concurrent_requests = peak_concurrency(records);
  for (const BenchMetric metric : options.metrics) {
    out.statistics.push_back(statistics_of(values_of(records, metric), options.percentiles));
  }
  return out;
}

json::object to_json(const BenchSummary& summary, const BenchSummaryOptions& options) {
  json::object out{{"duration", summary.duration},
                   {"completed", summary.completed},
                   {"failed", summary.failed},
                   {"total_input_tokens", summary.total_input_tokens},
                   {"total_output_tokens", summary.total_output_tokens},
                   {"request_throughput", summary.request_throughput},
                   {"request_goodput", nullptr},
                   {"output_throughput", summary.output_throughput},
                   {"total_token_throughput", summary.total_token_throughput},
                   {"max_output_tokens_per_s", summary.max_output_tokens_per_s},
                   {"max_concurrent_requests", summary.max_concurrent_requests}};
  if (summary.request_goodput) out["request_goodput"] = *summary.request_goodput;
  for (std::size_t i = 0; i < options.metrics.size(); ++i) {
    const std::string end = "_" + std::string(metric_name(options.metrics[i])) + "_ms";
    const BenchStatistics& statistics = summary.statistics[i];
    out["mean" + end] = statistics.mean;
    out["median" + end] = statistics.median;
    out["std" + end] = statistics.std;
    for (std::size_t p = 0; p < options.percentiles.size(); ++p) {
      out["p" + percentile_text(options.percentiles[p]) + end] = statistics.percentiles[p];
    }
  }
  return out;
}

void add_details(json::object& result, const std::vector<BenchRecord>& records) {
  result["input_lens"] = list(records, [](const BenchRecord& r) { return r.prompt_tokens; });
  result["output_lens"] = list(records, [](const BenchRecord& r) { return r.output_tokens; });
  result["ttfts"] = list(records, [](const BenchRecord& r) { return ttft_ms(r) / 1e3; });
  result["itls"] = list(records, [](const BenchRecord& r) {
    json::array gaps;
    for (const double gap : gaps_ms(r)) gaps.push_back(gap / 1e3);
    return gaps;
  });
  result["latencies"] = list(records, [](const BenchRecord& r) { return r.ended - r.sent; });
  result["start_times"] = list(records, [](const BenchRecord& r) { return r.sent; });
  result["queue_times"] = list(records, [](const BenchRecord& r) { return r.sent - r.due; });
  result["generated_texts"] =
      list(records, [](const BenchRecord& r) { return json::value(r.text); });
  result["errors"] = list(records, [](const BenchRecord& r) { return json::value(r.error); });
}

std::string report_text(const BenchSummary& summary, const BenchSummaryOptions& options,
                        double request_rate, std::size_t max_concurrency) {
  std::string text = heading("Serving Benchmark Result", '=');
  text += line("Successful requests:", summary.completed);
  text += line("Failed requests:", summary.failed);
  if (max_concurrency > 0) text += line("Maximum request concurrency:", max_concurrency);
  if (std::isfinite(request_rate)) text += line("Request rate configured (RPS):", request_rate);
  text += line("Benchmark duration (s):", summary.duration);
  text += line("Total input tokens:", static_cast<std::size_t>(summary.total_input_tokens));
  text += line("Total generated tokens:", static_cast<std::size_t>(summary.total_output_tokens));
  text += line("Request throughput (req/s):", summary.request_throughput);
  if (summary.request_goodput) text += line("Request goodput (req/s):", *summary.request_goodput);
  text += line("Output token throughput (tok/s):", summary.output_throughput);
  text += line("Peak output token throughput (tok/s):", summary.max_output_tokens_per_s);
  text += line("Peak concurrent requests:", summary.max_concurrent_requests);
  text += line("Total token throughput (tok/s):", summary.total_token_throughput);
  for (std::size_t i = 0; i < options.metrics.size(); ++i) {
    const MetricNames& names = names_of(options.metrics[i]);
    const std::string label = std::string(names.label) + " (ms):";
    const BenchStatistics& statistics = summary.statistics[i];
    text += heading(names.title, '-');
    text += line("Mean " + label, statistics.mean);
    text += line("Median " + label, statistics.median);
    for (std::size_t p = 0; p < options.percentiles.size(); ++p) {
      text += line("P" + percentile_text(options.percentiles[p]) + " " + label,
                   statistics.percentiles[p]);
    }
  }
  return text + std::string(50, '=') + "\n";
}

}  // namespace spindle::cli
