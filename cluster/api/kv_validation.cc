#include "cluster/api/kv_validation.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <utility>

#include "cluster/api/range_check.h"

namespace spindle::api {
namespace {

std::string profile_names() {
  std::string names;
  for (const kvstore::KvProfile profile : kvstore::all_profiles()) {
    names += (names.empty() ? "" : ", ") + std::string(kvstore::profile_name(profile));
  }
  return names;
}

// The policy that the unset fields of a request's policy come from.
kvstore::KvPolicy base_policy(const std::string& profile, const kvstore::KvPolicy& default_policy,
                              RangeCheck& check) {
  if (profile.empty()) return default_policy;
  kvstore::KvPolicy policy;
  const auto parsed = kvstore::parse_profile(profile);
  if (!parsed) {
    check.fail("kv_policy.profile", "kv_policy.profile must be one of " + profile_names());
    return policy;
  }
  policy.profile = *parsed;
  // A property of the model rather than of a profile, and no request can set it.
  policy.lazy_threshold = default_policy.lazy_threshold;
  policy.lazy_test = default_policy.lazy_test;
  return policy;
}

void check_override(const KvOverrideRequest& asked, const engine::EngineLimits& engine_limits,
                    RangeCheck& check, std::vector<kvstore::HeadOverride>& out) {
  const std::string field = fmt::format("kv_policy.overrides[{}]", out.size());
  const std::int64_t last = asked.last_layer.value_or(asked.first_layer);
  check.integer(field + ".first_layer", asked.first_layer, 0, KvBounds::kMaxLayers);
  check.integer(field + ".last_layer", last, asked.first_layer, KvBounds::kMaxLayers);
  if (asked.kv_head) check.integer(field + ".kv_head", *asked.kv_head, 0, KvBounds::kMaxLayers);
  kvstore::HeadOverride to;
  if (asked.mode == "full") {
    to.mode = kvstore::KvMode::kFull;
  } else if (asked.mode == "evict") {
    to.mode = kvstore::KvMode::kEvict;
  } else if (asked.mode == "stream") {
    to.mode = kvstore::KvMode::kStream;
  } else if (!asked.mode.empty()) {
    check.fail(field + ".mode", field + ".mode must be full, evict or stream");
  }
  if (!asked.codec.empty()) {
    to.codec = kvstore::parse_codec(asked.codec);
    if (!to.codec) {
      check.fail(field + ".codec", field + ".codec must be one of " + kvstore::codec_names() +
                                       ", or two of them for keys / values");
    }
  }
  if (asked.window) {
    check.integer(field + ".window", *asked.window, 1, engine_limits.max_model_len);
    to.window = *asked.window;
  }
  if (asked.keep_ratio) {
    check.real(field + ".keep_ratio", *asked.keep_ratio, 0, 1, /*open_low=*/true);
    to.keep_ratio = *asked.keep_ratio;
  }
  if (!check.ok()) return;
  to.first_layer = static_cast<int>(asked.first_layer);
  to.last_layer = static_cast<int>(last);
  to.kv_head = static_cast<int>(asked.kv_head.value_or(-1));
  out.push_back(to);
}

void check_policy(const KvPolicyRequest& asked, const engine::EngineLimits& engine_limits,
                  const config::Limits& limits, RangeCheck& check, kvstore::KvPolicy& policy) {
  if (!limits.allow_kv_policy()) {
    check.fail("kv_policy", "this server does not let a request choose its kv_policy");
  }
  if (asked.ratio && asked.max_bytes) {
    check.fail("kv_policy.max_bytes", "give either kv_policy.ratio or kv_policy.max_bytes");
  }
  if (asked.ratio) {
    check.real("kv_policy.ratio", *asked.ratio, 0, 1, /*open_low=*/true);
    if (*asked.ratio < limits.min_kv_ratio()) {
      check.fail("kv_policy.ratio", fmt::format("kv_policy.ratio must be at least {:g} on this "
                                                "server, got {:g}",
                                                limits.min_kv_ratio(), *asked.ratio));
    }
    policy.ratio = *asked.ratio;
    policy.max_bytes = 0;
    policy.best_effort = false;
  }
  if (asked.max_bytes) {
    check.integer("kv_policy.max_bytes", *asked.max_bytes, 1, KvBounds::kMaxBytes);
    policy.max_bytes = static_cast<std::uint64_t>(*asked.max_bytes);
    policy.ratio = 0;
    policy.best_effort = false;
  }
  const std::int64_t sinks = asked.sinks.value_or(policy.sinks);
  const std::int64_t recent = asked.recent.value_or(policy.recent);
  const std::int64_t window = asked.window.value_or(policy.window);
  if (asked.sinks) check.integer("kv_policy.sinks", sinks, 0, KvBounds::kMaxSinks);
  if (asked.recent) check.integer("kv_policy.recent", recent, 0, engine_limits.max_model_len);
  if (asked.window) check.integer("kv_policy.window", window, 1, engine_limits.max_model_len);
  if (!check.ok()) return;
  policy.sinks = static_cast<int>(sinks);
  policy.recent = static_cast<int>(recent);
  policy.window = window;
  if (asked.overrides.size() > KvBounds::kMaxOverrides) {
    check.fail("kv_policy.overrides",
               fmt::format("kv_policy.overrides must have at most {} entries, got {}",
                           KvBounds::kMaxOverrides, asked.overrides.size()));
    return;
  }
  if (!asked.overrides.empty()) policy.overrides.clear();
  for (const KvOverrideRequest& entry : asked.overrides) {
    check_override(entry, engine_limits, check, policy.overrides);
  }
}

void check_boundaries(const GenerateRequest& request, const engine::EngineLimits& engine_limits,
                      const config::Limits& limits, RangeCheck& check,
                      std::vector<std::int32_t>& out) {
  const auto most = static_cast<std::size_t>(std::max(0, limits.max_compress_points()));
  if (request.compress_at.size() > most) {
    check.fail("compress_at", fmt::format("compress_at must have at most {} positions, got {}",
                                          most, request.compress_at.size()));
  }
  if (const auto* chat = std::get_if<ChatPrompt>(&request.prompt)) {
    const std::size_t n_messages = chat->compress_after.size();
    if (n_messages > most) {
      check.fail("messages",
                 fmt::format("at most {} messages may have compress, got {}", most, n_messages));
    }
    if (n_messages > 0 && !request.compress_at.empty()) {
      check.fail("compress_at", "give either compress_at or compress on messages");
    }
  }
  std::int64_t before = 0;
  for (const std::int64_t position : request.compress_at) {
    check.integer("compress_at", position, 1, engine_limits.max_model_len);
    if (position <= before) {
      check.fail("compress_at",
                 fmt::format("compress_at must be ascending, got {} after {}", position, before));
    }
    if (!check.ok()) return;
    out.push_back(static_cast<std::int32_t>(position));
    before = position;
  }
}

void check_session(const GenerateRequest& request, RangeCheck& check) {
  const std::string& id = request.session_id;
  const bool printable =
      std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < '\x7f'; });
  if (id.size() > KvBounds::kMaxSessionIdBytes || !printable) {
    check.fail("session_id",
               fmt::format("session_id must be at most {} printable ASCII characters without "
                           "spaces",
                           KvBounds::kMaxSessionIdBytes));
  }
  if (request.keep_session && id.empty()) {
    check.fail("keep_session", "keep_session needs a session_id");
  }
  // A session is one sequence, and choices are several.
  if (request.keep_session && request.sampling.n.value_or(1) != 1) {
    check.fail("keep_session",
               fmt::format("keep_session needs n = 1, got {}", request.sampling.n.value_or(1)));
  }
}

void check_scores(const PromptScoresRequest& asked, const engine::EngineLimits& engine_limits,
                  const config::Limits& limits, RangeCheck& check, engine::PromptScores& out) {
  const std::int64_t longest = engine_limits.max_model_len;
  check.integer("prompt_scores.first", asked.first, 1, longest);
  check.integer("prompt_scores.end", asked.end, 1, longest);
  if (!check.ok()) return;
  if (asked.end <= asked.first) {
    check.fail(
        "prompt_scores.end",
        fmt::format("prompt_scores.end must be greater than prompt_scores.first ({}), got {}",
                    asked.first, asked.end));
  }
  const std::int64_t n_tokens = asked.end - asked.first;
  if (n_tokens > limits.max_score_tokens()) {
    check.fail("prompt_scores.end", fmt::format("prompt_scores must cover at most {} tokens, got "
                                                "{}",
                                                limits.max_score_tokens(), n_tokens));
  }
  if (asked.dense) {
    const auto bytes_per_token =
        std::max<std::int64_t>(engine_limits.vocab_size, 1) * std::int64_t{sizeof(float)};
    const std::int64_t most = std::min<std::int64_t>(limits.max_dense_scores(),
                                                     KvBounds::kMaxDenseBytes / bytes_per_token);
    if (n_tokens > most) {
      check.fail(
          "prompt_scores.dense",
          fmt::format("dense prompt_scores must cover at most {} tokens, got {}", most, n_tokens));
    }
  }
  out = {.first = static_cast<std::int32_t>(asked.first),
         .end = static_cast<std::int32_t>(asked.end),
         .dense = asked.dense};
}

}  // namespace

std::optional<ApiError> validate_kv(const GenerateRequest& request,
                                    const engine::EngineLimits& engine_limits,
                                    const config::Limits& limits,
                                    const kvstore::KvPolicy& default_policy, ValidatedKv& out) {
  RangeCheck check;
  out.policy = default_policy;
  // A size that the request did not name is met as well as its prompt allows.
  out.policy.best_effort = true;
  if (request.kv_policy) {
    out.policy = base_policy(request.kv_policy->profile, default_policy, check);
    check_policy(*request.kv_policy, engine_limits, limits, check, out.policy);
  }
  check_boundaries(request, engine_limits, limits, check, out.compress_at);
  check_session(request, check);
  if (request.prompt_scores) {
    check_scores(*request.prompt_scores, engine_limits, limits, check, out.scores);
  }
  return check.take();
}

std::optional<ApiError> fit_to_prompt(const ValidatedKv& kv, std::size_t prompt_tokens) {
  const auto length = static_cast<std::int64_t>(prompt_tokens);
  RangeCheck check;
  if (!kv.compress_at.empty() && kv.compress_at.back() > length) {
    check.fail("compress_at",
               fmt::format("compress_at must not exceed the prompt's {} tokens, got {}", length,
                           kv.compress_at.back()));
  }
  if (kv.scores.end > length) {
    check.fail("prompt_scores.end",
               fmt::format("prompt_scores.end must not exceed the prompt's {} tokens, got {}",
                           length, kv.scores.end));
  }
  return check.take();
}

}  // namespace spindle::api
