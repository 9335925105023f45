#include "kvstore/plan/kv_plan.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kvstore/plan/plan_frame.h"

namespace spindle::kvstore {
namespace {

constexpr std::array kFormats{
    kernels::KvFormat::kRaw,    kernels::KvFormat::kInt4,   kernels::KvFormat::kKivi4,
    kernels::KvFormat::kKivi2,  kernels::KvFormat::kLloyd1, kernels::KvFormat::kLloyd2,
    kernels::KvFormat::kLloyd3, kernels::KvFormat::kLloyd4, kernels::KvFormat::kCodebook,
    kernels::KvFormat::kToken,
};

std::optional<kernels::KvFormat> parse_format(std::string_view name) {
  for (const kernels::KvFormat format : kFormats) {
    if (format_name(format) == name) return format;
  }
  return std::nullopt;
}

using kernels::KvFormat;

constexpr std::array<std::pair<KvProfile, std::string_view>, 13> kProfileNames = {{
    {KvProfile::kFull, "full"},
    {KvProfile::kSpindle, "spindle"},
    {KvProfile::kSpindleKv, "spindlekv"},
    {KvProfile::kSimLayerKv, "simlayerkv"},
    {KvProfile::kSimLayerKvInt4, "simlayerkv-int4"},
    {KvProfile::kSnapKv, "snapkv"},
    {KvProfile::kPyramidKv, "pyramidkv"},
    {KvProfile::kStreaming, "streaming"},
    {KvProfile::kKeyDiff, "keydiff"},
    {KvProfile::kDefensive, "defensive"},
    {KvProfile::kInt4, "int4"},
    {KvProfile::kKivi4, "kivi4"},
    {KvProfile::kKivi2, "kivi2"},
}};

std::string_view mode_name(KvMode mode) {
  switch (mode) {
    case KvMode::kFull:
      return "FULL";
    case KvMode::kEvict:
      return "EVICT";
    case KvMode::kStream:
      return "STREAM";
  }
  return "?";
}

}  // namespace

std::string_view format_name(KvFormat format) {
  switch (format) {
    case KvFormat::kRaw:
      return "raw";
    case KvFormat::kInt4:
      return "int4";
    case KvFormat::kKivi4:
      return "kivi4";
    case KvFormat::kKivi2:
      return "kivi2";
    case KvFormat::kLloyd1:
      return "lloyd1";
    case KvFormat::kLloyd2:
      return "lloyd2";
    case KvFormat::kLloyd3:
      return "lloyd3";
    case KvFormat::kLloyd4:
      return "lloyd4";
    case KvFormat::kCodebook:
      return "codebook";
    case KvFormat::kToken:
      return "token";
  }
  return "?";
}

std::string plan_name(const HeadPlan& plan) {
  std::string name(mode_name(plan.mode));
  name += ' ';
  name += format_name(plan.codec.k);
  // Token ids stand for both sides at once.
  if (plan.codec.k != KvFormat::kToken) {
    name += '/';
    name += format_name(plan.codec.v);
  }
  if (plan.mode == KvMode::kStream) name += ' ' + std::to_string(plan.window);
  return name;
}

std::string_view profile_name(KvProfile profile) {
  for (const auto& [value, name] : kProfileNames) {
    if (value == profile) return name;
  }
  return "?";
}

std::optional<KvProfile> parse_profile(std::string_view name) {
  for (const auto& [value, text] : kProfileNames) {
    if (text == name) return value;
  }
  return std::nullopt;
}

std::vector<KvProfile> all_profiles() {
  std::vector<KvProfile> profiles;
  for (const auto& entry : kProfileNames) profiles.push_back(entry.first);
  return profiles;
}

SequencePlan uncompressed_plan(const KvPolicy& policy, const KvModel& model) {
  return {.sinks = policy.sinks,
          .recent = policy.recent / kernels::kKvBlockTokens * kernels::kKvBlockTokens,
          .heads = std::vector<HeadPlan>(static_cast<std::size_t>(model.n_tables()))};
}

bool is_uncompressed(const SequencePlan& plan) {
  return std::all_of(plan.heads.begin(), plan.heads.end(),
                     [](const HeadPlan& head) { return head == HeadPlan{}; });
}

std::int64_t count_new_ids(std::span<const std::int32_t> ids, std::int64_t n_seen, int vocab_size) {
  std::vector<bool> seen(static_cast<std::size_t>(std::max(vocab_size, 0)));
  std::int64_t n_new = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const bool is_old = static_cast<std::int64_t>(i) < n_seen;
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      n_new += is_old ? 0 : 1;
      continue;
    }
    const auto id = static_cast<std::size_t>(ids[i]);
    n_new += is_old || seen[id] ? 0 : 1;
    seen[id] = true;
  }
  return n_new;
}

BoundaryNeeds boundary_needs(const KvPolicy& policy, const KvModel& model) {
  BoundaryNeeds needs;
  needs.selector = policy_selectors(policy, model).front();
  needs.lazy_mass = is_simlayer(policy.profile);
  if (needs.lazy_mass) needs.lazy_window = lazy_window(policy);
  // KeyDiff looks at keys alone.
  needs.window_scores = needs.lazy_mass || (needs.selector != KvSelector::kNone &&
                                            needs.selector != KvSelector::kKeyDiff);
  needs.histograms = is_global(policy.profile);
  return needs;
}

double boost_share(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                   std::int64_t n_tokens) {
  const double ratio = plan_size(policy, model, table, std::max<std::int64_t>(n_tokens, 1)).ratio;
  // What most heads are stored as.
  const kernels::KvFormat format =
      policy.profile == KvProfile::kSpindle ? kernels::KvFormat::kLloyd4 : kernels::KvFormat::kInt4;
  const auto side = [&](kernels::KvFormat f) {
    return static_cast<double>(
        kernels::kv_side_bytes(f, kernels::KvSide::kKey, model.head_dim, model.dtype).total());
  };
  return std::min(1.0, ratio * side(kernels::KvFormat::kRaw) / side(format));
}

std::optional<kernels::KvCodec> parse_codec(std::string_view name) {
  const std::size_t slash = name.find('/');
  const auto k = parse_format(name.substr(0, slash));
  const auto v = slash == std::string_view::npos ? k : parse_format(name.substr(slash + 1));
  if (!k || !v) return std::nullopt;
  if ((*k == kernels::KvFormat::kToken) != (*v == kernels::KvFormat::kToken)) return std::nullopt;
  return kernels::KvCodec{.k = *k, .v = *v};
}

std::string codec_names() {
  std::string names;
  for (const kernels::KvFormat format : kFormats) {
    names += (names.empty() ? "" : ", ") + std::string(format_name(format));
  }
  return names;
}

}  // namespace spindle::kvstore
