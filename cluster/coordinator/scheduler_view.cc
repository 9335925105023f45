// What the scheduler shows of its requests.

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"

namespace spindle::coordinator {
namespace {

// "spindle 0.25", "int4", "snapkv 1048576 B"
std::string policy_label(const kvstore::KvPolicy& policy) {
  std::string label(kvstore::profile_name(policy.profile));
  if (policy.ratio > 0) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), " %.3g", policy.ratio);
    label += text.data();
  } else if (policy.max_bytes > 0) {
    label += " " + std::to_string(policy.max_bytes) + " B";
  }
  return label;
}

}  // namespace

engine::ActiveRequest Scheduler::active_request(const Request& request, std::int64_t now_us) {
  engine::ActiveRequest active;
  active.handle = request.handle;
  active.running = request.admitted;
  active.priority = request.request.priority;
  active.prompt_tokens = static_cast<std::int32_t>(request.n_before_output());
  active.prefilled_tokens = static_cast<std::int32_t>(request.n_prefilled);
  active.generated_tokens = request.summary.completion_tokens;
  active.max_tokens = active.generated_tokens;
  for (const Choice& choice : request.choices) {
    active.max_tokens += request.max_generated - choice.n_generated;
  }
  active.age_us = now_us - request.submitted_us;
  active.policy = policy_label(request.request.kv_policy);
  return active;
}

std::vector<engine::ActiveRequest> Scheduler::active_requests(std::size_t limit,
                                                              std::int64_t now_us) const {
  std::vector<const Request*> shown;
  for (const auto& [handle, request] : requests_) {
    if (request->admitted) shown.push_back(request.get());
  }
  std::sort(shown.begin(), shown.end(),
            [](const Request* a, const Request* b) { return a->admission < b->admission; });
  if (shown.size() < limit && !waiting_.empty()) {
    for (const engine::RequestHandle handle : waiting_.order()) {
      shown.push_back(requests_.at(handle).get());
    }
  }
  if (shown.size() > limit) shown.resize(limit);
  std::vector<engine::ActiveRequest> active;
  active.reserve(shown.size());
  for (const Request* request : shown) active.push_back(active_request(*request, now_us));
  return active;
}

}  // namespace spindle::coordinator
