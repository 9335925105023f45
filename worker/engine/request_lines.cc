#include "worker/engine/request_lines.h"

#include <fmt/format.h>

#include <cstdint>

namespace spindle::worker {

std::string accepted_line(const engine::EngineRequest& request) {
  return fmt::format(
      "accepted: {} prompt tokens, up to {} generated, n {}, priority {}, KV policy {}",
      request.prompt_ids.size(), request.sampling.max_tokens, request.sampling.n_choices,
      request.priority, kvstore::profile_name(request.kv_policy.profile));
}

std::string ended_line(const Status& status, const engine::RequestSummary& summary) {
  std::string line = status.ok()                               ? "finished"
                     : status.code() == StatusCode::kCancelled ? "cancelled"
                                                               : "failed: " + status.to_string();
  line += fmt::format(": {} prompt and {} generated tokens", summary.prompt_tokens,
                      summary.completion_tokens);
  if (summary.queue_ms > 0) line += fmt::format(", queued {:.1f} ms", summary.queue_ms);
  if (summary.time_to_first_token_ms > 0) {
    line += fmt::format(", first token after {:.1f} ms", summary.time_to_first_token_ms);
  }
  if (summary.total_ms > 0) line += fmt::format(", done after {:.1f} ms", summary.total_ms);
  std::uint64_t full = 0;
  std::uint64_t kept = 0;
  for (const engine::StageKvUse& stage : summary.kv) {
    full += stage.full_bytes;
    kept += stage.kept_bytes;
  }
  if (full > 0) {
    line += fmt::format(", KV {:.1f} % of {:.1f} MB",
                        100 * static_cast<double>(kept) / static_cast<double>(full),
                        static_cast<double>(full) / 1e6);
  }
  return line;
}

}  // namespace spindle::worker
