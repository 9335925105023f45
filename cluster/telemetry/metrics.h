#pragma once
// What a serving process counts, and the text that Prometheus scrapes. README.md lists every
// metric.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
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
  explicit Metrics(std::string model_name);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  void count_refused(RefusalReason reason);
  void count_finished_choice(FinishedReason reason);
  void observe_time_to_first_token(double seconds);
  void observe_inter_token_latency(double seconds);
  // Once per request that ended: submit to end, submit to first step, and its sizes.
  void observe_request(double e2e_seconds, double queue_seconds, std::int64_t prompt_tokens,
                       std::int64_t generation_tokens);
  // `handler` is a route's pattern from a fixed table, never a path sent by a client.
  void count_http_request(std::string_view handler, std::string_view method, int status);

  Latencies latencies() const;

  // Prometheus text exposition format 0.0.4 of everything, with the engine's state as given.
  std::string render(const engine::EngineStats& stats) const;

  static constexpr std::string_view kContentType = "text/plain; version=0.0.4; charset=utf-8";

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace spindle::telemetry
