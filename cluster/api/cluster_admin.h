#pragma once
// What an operator may ask of the whole cluster over HTTP beside generating. The daemon implements
// it; cluster/api only knows the words.

#include <cstdint>
#include <functional>
#include <stop_token>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace spindle::api {

struct TraceRequest {
  double seconds = 5;
  std::int64_t max_events = 65536;  // kept of each rank; the oldest go first
};

inline constexpr double kMaxTraceSeconds = 60;
inline constexpr std::int64_t kMinTraceEvents = 16;
inline constexpr std::int64_t kMaxTraceEvents = std::int64_t{1} << 20;

// Thread-safety: every member may be called from any thread. Both wait for other ranks, so never
// from an I/O thread.
class ClusterAdmin {
 public:
  // A document piece by piece: each call puts the next one in place of `piece`, and returns false
  // after the last. From one thread at a time.
  using Pieces = std::function<bool(std::string& piece)>;

  virtual ~ClusterAdmin() = default;

  // On every rank. INVALID_ARGUMENT when there is no such level.
  virtual Status set_log_level(std::string_view level) = 0;

  // Records what every rank does and returns when the time is over, or `stop` is requested
  // (CANCELLED). The document is a Chrome trace, in JSON. RESOURCE_EXHAUSTED while another
  // recording is under way. The request's values are within the limits above.
  virtual Result<Pieces> trace(const TraceRequest& request, const std::stop_token& stop) = 0;
};

}  // namespace spindle::api
