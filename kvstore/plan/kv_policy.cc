#include <bit>
#include <cmath>
#include <sstream>
#include <string>

#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;

// Floors are named in steps of 1 / kRatioSteps.
constexpr double kRatioSteps = 10000;

template <typename T>
Status out_of_range(const std::string& field, std::string_view range, T value) {
  std::ostringstream text;
  text << "kv_policy." << field << " must be " << range << ", got " << value;
  return invalid_argument(text.str());
}

Status bad_override(std::size_t index, std::string_view field, std::string_view problem) {
  return invalid_argument("kv_policy.overrides[" + std::to_string(index) + "]." +
                          std::string(field) + " " + std::string(problem));
}

bool profile_has_window(const KvPolicy& policy) {
  if (policy.profile == KvProfile::kStreaming || is_simlayer(policy.profile)) return true;
  for (const HeadOverride& range : policy.overrides) {
    if (range.mode == KvMode::kStream) return true;
  }
  return false;
}

Status check_ranges(const KvPolicy& policy, std::int64_t n_prompt_tokens) {
  if (!(policy.ratio >= 0.0 && policy.ratio <= 1.0)) {  // refuses NaN
    return out_of_range("ratio", "in (0, 1]", policy.ratio);
  }
  if (policy.ratio > 0.0 && policy.max_bytes > 0) {
    return invalid_argument("give either kv_policy.ratio or kv_policy.max_bytes");
  }
  if (policy.sinks < 0 || policy.sinks > kMaxSinks) {
    return out_of_range("sinks", "in [0, " + std::to_string(kMaxSinks) + "]", policy.sinks);
  }
  if (policy.recent < 0 || policy.recent > kMaxRecent) {
    return out_of_range("recent", "in [0, " + std::to_string(kMaxRecent) + "]", policy.recent);
  }
  if (policy.window < 0) return out_of_range("window", "at least 1", policy.window);
  if (policy.window > n_prompt_tokens) {
    return out_of_range("window",
                        "at most the prompt's " + std::to_string(n_prompt_tokens) + " tokens",
                        policy.window);
  }
  if (policy.window > 0 && !profile_has_window(policy)) {
    return invalid_argument("kv_policy.window is for profiles that stream, and " +
                            std::string(profile_name(policy.profile)) + " does not");
  }
  if (!(policy.lazy_threshold >= 0.0 && policy.lazy_threshold <= 1.0)) {
    return out_of_range("lazy_threshold", "in (0, 1]", policy.lazy_threshold);
  }
  return ok_status();
}

Status check_override(const HeadOverride& range, std::size_t index, const KvModel& model) {
  if (range.first_layer < 0 || range.first_layer > range.last_layer ||
      range.last_layer >= model.n_layers) {
    return bad_override(
        index, "last_layer",
        "must end a range of the model's layers 0 to " + std::to_string(model.n_layers - 1));
  }
  if (range.kv_head < -1 || range.kv_head >= model.n_kv_heads) {
    return bad_override(
        index, "kv_head",
        "must be -1 for all, or one of 0 to " + std::to_string(model.n_kv_heads - 1));
  }
  if (range.keep_ratio && !(*range.keep_ratio > 0.0 && *range.keep_ratio <= 1.0)) {
    return bad_override(index, "keep_ratio", "must be in (0, 1]");
  }
  if (range.keep_ratio && range.mode.value_or(KvMode::kEvict) != KvMode::kEvict) {
    return bad_override(index, "keep_ratio", "is for mode EVICT");
  }
  if (range.mode == KvMode::kEvict && !range.keep_ratio) {
    return bad_override(index, "keep_ratio", "must be set for mode EVICT");
  }
  if (range.window && *range.window < 1) return bad_override(index, "window", "must be at least 1");
  if (range.window && range.mode.value_or(KvMode::kStream) != KvMode::kStream) {
    return bad_override(index, "window", "is for mode STREAM");
  }
  if (range.window && range.keep_ratio) {
    return bad_override(index, "window", "and keep_ratio exclude each other");
  }
  if (!range.codec) return ok_status();
  const bool k_token = range.codec->k == KvFormat::kToken;
  if (k_token != (range.codec->v == KvFormat::kToken)) {
    return bad_override(index, "codec", "token is for keys and values together");
  }
  const bool partial = range.keep_ratio || range.window || range.mode == KvMode::kEvict ||
                       range.mode == KvMode::kStream;
  if (k_token && (range.last_layer != 0 || partial)) {
    return bad_override(index, "codec", "token is for complete heads of layer 0");
  }
  return ok_status();
}

Status check_selectors(const KvPolicy& policy, const KvModel& model) {
  const std::vector<KvSelector> selectors = policy_selectors(policy, model);
  for (std::size_t i = 0; i < policy.overrides.size(); ++i) {
    const HeadOverride& range = policy.overrides[i];
    if (range.selector && *range.selector != KvSelector::kNone) {
      if (selectors.size() > 1) {
        return bad_override(i, "selector", "differs from that of other heads: a policy has one");
      }
      if (is_global(policy.profile) && *range.selector != KvSelector::kDefensive) {
        return bad_override(
            i, "selector",
            "cannot be changed in profile " + std::string(profile_name(policy.profile)));
      }
    }
    if (range.keep_ratio && selectors.front() == KvSelector::kNone) {
      return bad_override(i, "selector",
                          "must be set: profile " + std::string(profile_name(policy.profile)) +
                              " scores no tokens");
    }
  }
  return ok_status();
}

// Coded formats that a profile may give a head; kRaw for none.
KvFormat profile_format(KvProfile profile) {
  switch (profile) {
    case KvProfile::kSpindle:
      return KvFormat::kLloyd4;
    case KvProfile::kSpindleKv:
      return KvFormat::kCodebook;
    case KvProfile::kDefensive:
    case KvProfile::kInt4:
      return KvFormat::kInt4;
    case KvProfile::kSimLayerKvInt4:
    case KvProfile::kKivi4:
      return KvFormat::kKivi4;
    case KvProfile::kKivi2:
      return KvFormat::kKivi2;
    case KvProfile::kFull:
    case KvProfile::kSimLayerKv:
    case KvProfile::kSnapKv:
    case KvProfile::kPyramidKv:
    case KvProfile::kStreaming:
    case KvProfile::kKeyDiff:
      return KvFormat::kRaw;
  }
  return KvFormat::kRaw;
}

// What `format` needs of head_dim and this model does not have; empty when all is well.
std::string head_dim_problem(KvFormat format, int head_dim) {
  const std::string got = ", and this model's is " + std::to_string(head_dim);
  if (format == KvFormat::kRaw) return {};
  if (head_dim <= 0 || head_dim % 32 != 0) return "needs a head_dim that is a multiple of 32" + got;
  // The Hadamard matrix; codebooks fall back to a format that uses it.
  const bool rotated = kernels::is_rotated(format) || format == KvFormat::kCodebook;
  if (rotated && !std::has_single_bit(static_cast<unsigned>(head_dim))) {
    return "needs a head_dim that is a power of two" + got;
  }
  return {};
}

Status check_head_dim(const KvPolicy& policy, const KvModel& model) {
  const std::string problem = head_dim_problem(profile_format(policy.profile), model.head_dim);
  if (!problem.empty()) {
    return invalid_argument("kv_policy.profile " + std::string(profile_name(policy.profile)) + " " +
                            problem);
  }
  for (std::size_t i = 0; i < policy.overrides.size(); ++i) {
    if (!policy.overrides[i].codec) continue;
    for (const KvFormat format : {policy.overrides[i].codec->k, policy.overrides[i].codec->v}) {
      const std::string wrong = head_dim_problem(format, model.head_dim);
      if (!wrong.empty()) {
        return bad_override(i, "codec", std::string(format_name(format)) + " " + wrong);
      }
    }
  }
  return ok_status();
}

}  // namespace

bool never_compressed(const KvPolicy& policy, std::int64_t n_tokens) {
  return n_tokens <= policy.sinks + kUncompressedTokens;
}

std::uint64_t floor_bytes(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                          std::int64_t n_tokens, std::int64_t n_ids) {
  if (never_compressed(policy, n_tokens)) {
    return plan_bytes(uncompressed_plan(policy, model), model, n_tokens, 0);
  }
  // A budget of nothing gives the smallest plan, whatever the scores are.
  BoundaryReport report;
  report.n_tokens = n_tokens;
  report.n_candidates = n_tokens - kObservationWindow - policy.sinks;
  report.n_new_ids = n_ids;
  report.lazy_mass.resize(static_cast<std::size_t>(model.n_layers));
  return plan_sized(policy, model, table, report, 0, 0.0).bytes +
         kAllowancePages * page_bytes(model);
}

Status below_floor(const KvPolicy& policy, const KvModel& model, std::int64_t n_tokens,
                   std::uint64_t floor) {
  std::ostringstream text;
  text << "kv_policy." << (policy.max_bytes > 0 ? "max_bytes" : "ratio")
       << " is too small: profile " << profile_name(policy.profile) << " needs at least ";
  if (policy.max_bytes > 0) {
    text << floor << " for " << n_tokens << " tokens, got " << policy.max_bytes;
    return invalid_argument(text.str());
  }
  const auto full = static_cast<double>(full_bytes(model, n_tokens));
  double steps = std::ceil(static_cast<double>(floor) / full * kRatioSteps);
  while (static_cast<std::uint64_t>(steps / kRatioSteps * full) < floor) ++steps;
  if (steps > kRatioSteps) {
    text << "more than the uncompressed bytes of " << n_tokens
         << " tokens; leave it unset for prompts this short";
  } else {
    text << steps / kRatioSteps << " (" << floor << " bytes) for " << n_tokens << " tokens, got "
         << policy.ratio;
  }
  return invalid_argument(text.str());
}

Status validate_policy(const KvPolicy& policy, const KvModel& model, std::int64_t n_prompt_tokens,
                       const ProfileTable* table, std::int64_t n_ids) {
  if (Status status = check_ranges(policy, n_prompt_tokens); !status.ok()) return status;
  for (std::size_t i = 0; i < policy.overrides.size(); ++i) {
    if (Status status = check_override(policy.overrides[i], i, model); !status.ok()) return status;
  }
  if (Status status = check_selectors(policy, model); !status.ok()) return status;
  if (Status status = check_head_dim(policy, model); !status.ok()) return status;
  const PlanSize size = plan_size(policy, model, table, n_prompt_tokens);
  if (!size.limited || size.soft) return ok_status();
  // A share of what is never compressed is no bound; bytes are.
  if (policy.max_bytes == 0 && never_compressed(policy, n_prompt_tokens)) return ok_status();
  const std::uint64_t floor = floor_bytes(policy, model, table, n_prompt_tokens, n_ids);
  if (size.bytes >= floor) return ok_status();
  if (policy.max_bytes == 0 && policy.profile == KvProfile::kFull) {
    return out_of_range("ratio", "1 or unset for profile full", policy.ratio);
  }
  return below_floor(policy, model, n_prompt_tokens, floor);
}

}  // namespace spindle::kvstore
