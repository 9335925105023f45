#pragma once
// Puts a load on a cluster: sends each request when it is due and notes what comes back, when.

#include <atomic>
#include <cstddef>
#include <functional>
#include <vector>

#include "ops/cli/bench_load.h"
#include "ops/cli/bench_summary.h"
#include "ops/cli/options.h"

namespace spindle::cli {

// However many are due: what a server takes on the connections that one client opens.
inline constexpr std::size_t kMostConcurrency = 4096;

struct BenchRunOptions {
  ConnectionOptions connection;
  // What all requests have in common; the prompt and max_tokens come from the dataset.
  api::v1::GenerateRequest request;
  std::size_t max_concurrency = 0;  // open at a time; 0: kMostConcurrency
  bool keep_text = false;
};

struct BenchRun {
  std::vector<BenchRecord> records;  // as the prompts
  double duration = 0;               // seconds to the last end
};

// `times` as arrival_times() gives them. `on_end` is called from several threads. When `stop`
// becomes true what runs is cancelled and the rest is not sent; both count as failed. A status only
// when a connection cannot be made; a connection that is lost later fails its requests.
Result<BenchRun> run_load(const BenchRunOptions& options, const std::vector<BenchPrompt>& prompts,
                          const std::vector<double>& times, const std::atomic<bool>& stop,
                          const std::function<void()>& on_end);

}  // namespace spindle::cli
