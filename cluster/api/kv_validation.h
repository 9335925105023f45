#pragma once
// What a request says about its KV: policy, boundaries, session, scores of the prompt. Every range
// is checked here, before anything is tokenised; what depends on the model's shape or on the ratio
// a profile can reach is the engine's to judge (kvstore::validate_policy).

#include <cstdint>
#include <optional>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/engine/engine.h"
#include "kvstore/plan/kv_plan.h"
#include "proto/config.pb.h"

namespace spindle::api {

// Bounds that are not configured.
struct KvBounds {
  static constexpr std::int64_t kMaxSinks = 64;
  static constexpr std::int64_t kMaxBytes = std::int64_t{1} << 60;
  static constexpr std::size_t kMaxSessionIdBytes = 128;
  static constexpr std::int64_t kMaxLayers = 4095;
  static constexpr std::size_t kMaxOverrides = 1024;
  // Of one request's dense scores.
  static constexpr std::int64_t kMaxDenseBytes = std::int64_t{64} << 20;
};

struct ValidatedKv {
  kvstore::KvPolicy policy;
  std::vector<std::int32_t> compress_at;
  engine::PromptScores scores;
};

// Fills `out`, or returns an error that names the field, its range and the value.
std::optional<ApiError> validate_kv(const GenerateRequest& request,
                                    const engine::EngineLimits& engine_limits,
                                    const config::Limits& limits,
                                    const kvstore::KvPolicy& default_policy, ValidatedKv& out);

// What can be said only once the prompt's length is known.
std::optional<ApiError> fit_to_prompt(const ValidatedKv& kv, std::size_t prompt_tokens);

}  // namespace spindle::api
