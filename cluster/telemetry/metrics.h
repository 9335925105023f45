#pragma once
// What a serving process counts, and the text that Prometheus scrapes. README.md lists every
// metric.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cluster/engine/engine.h"

namespace spindle::telemetry {

// Why a request was turned away before it ran; one label value each.
enum class RefusalReason : std::uint8_t {
  kInvalid,      // the request itself is wrong
  kQueueFull,    // the queue or a byte bound is full; retry later
  kUnavailable,  // draining, starting or stopped
};

// How one choice of a request ended; label values follow vLLM (stop, length, abort, error).
enum class FinishedReason : std::uint8_t { kStop, kLength, kAbort, kError };

// A request that finished.
struct RequestTimes {
  double e2e_seconds = 0;      // arrival to end
  double queue_seconds = 0;    // submit to first step
  double prefill_seconds = 0;  // first step to first token
  double decode_seconds = 0;   // first to last token
  std::int64_t prompt_tokens = 0;
  std::int64_t generation_tokens = 0;          // of all choices
  std::int64_t longest_generation_tokens = 0;  // of one choice
  std::int64_t n_choices = 1;                  // asked for
  std::int64_t max_tokens = 0;                 // asked for, per choice
};

// An HTTP request that was answered.
struct HttpTimes {
  double seconds = 0;                // from its last byte to the last of the answer
  std::uint64_t request_bytes = 0;   // of the body
  std::uint64_t response_bytes = 0;  // head and body
};

// A histogram as it is: counts[i] observations up to bounds[i], and all of them last.
struct LatencyCounts {
  std::vector<double> bounds;
  std::vector<std::uint64_t> counts;  // [n_bounds + 1], cumulative
  double sum = 0;
};
struct Latencies {
  LatencyCounts time_to_first_token;
  LatencyCounts inter_token;
  LatencyCounts e2e;
};

struct MetricsOptions {
  std::string model_name;
  std::string version;
  std::int64_t max_model_len = 0;  // longest bucket of token counts; 0: unknown
  // Labels of spindle_cache_config_info: how the server was configured.
  std::vector<std::pair<std::string, std::string>> cache_config = {};
  bool vllm_names = false;  // export what vLLM has under its names as well
};

// The counters and histograms of one server. Nothing here is global: two servers in one process
// have two Metrics. Requests running, waiting, accepted and so on are not counted here but taken
// from one EngineStats snapshot at every scrape, so that they always add up.
//
// Thread-safety: every member may be called from any thread. Observations are a few atomic
// operations or a short lock; render() copies everything and is meant for a scrape every second.
// Invariant: label values come from fixed sets (an HTTP method outside the known ones is "other"),
// so the number of series is bounded whatever clients send.
class Metrics {
 public:
  explicit Metrics(MetricsOptions options);
  explicit Metrics(std::string model_name);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  void count_refused(RefusalReason reason);
  void count_finished_choice(FinishedReason reason);
  void observe_time_to_first_token(double seconds);
  void observe_inter_token_latency(double seconds);
  void observe_request(const RequestTimes& request);
  // `handler` is a route's pattern from a fixed table, never a path sent by a client. The first
  // when the status is known, the second when the answer is out.
  void count_http_request(std::string_view handler, std::string_view method, int status);
  void observe_http_request(std::string_view handler, const HttpTimes& request);

  Latencies latencies() const;

  // Prometheus text exposition format 0.0.4 of everything, with the engine's state as given.
  std::string render(const engine::EngineStats& stats) const;

  static constexpr std::string_view kContentType = "text/plain; version=0.0.4; charset=utf-8";

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace spindle::telemetry
