#include "worker/config/kv_policy.h"

#include <string>
#include <utility>

namespace spindle::config {
namespace {

std::string join(std::string list, std::string_view name) {
  if (!list.empty()) list += ", ";
  return list.append(name);
}

std::string profile_names() {
  std::string names;
  for (const kvstore::KvProfile profile : kvstore::all_profiles()) {
    names = join(std::move(names), kvstore::profile_name(profile));
  }
  return names;
}

// NaN is in no range.
Status check_share(const std::string& key, double value) {
  if (value > 0 && value <= 1) return ok_status();
  return invalid_argument(key + " must be above 0 and at most 1, got " + std::to_string(value));
}

kvstore::KvMode to_mode(KvOverride::Mode mode) {
  switch (mode) {
    case KvOverride::FULL:
      return kvstore::KvMode::kFull;
    case KvOverride::EVICT:
      return kvstore::KvMode::kEvict;
    case KvOverride::STREAM:
      return kvstore::KvMode::kStream;
  }
  return kvstore::KvMode::kFull;
}

Result<kvstore::HeadOverride> to_override(const KvOverride& from, const std::string& key) {
  kvstore::HeadOverride to;
  to.first_layer = from.first_layer();
  to.last_layer = from.has_last_layer() ? from.last_layer() : from.first_layer();
  to.kv_head = from.kv_head();
  if (to.last_layer < to.first_layer) {
    return invalid_argument(key + ".last_layer is before " + key + ".first_layer");
  }
  if (from.has_mode()) to.mode = to_mode(from.mode());
  if (from.has_window()) to.window = from.window();
  if (from.has_keep_ratio()) {
    if (Status status = check_share(key + ".keep_ratio", from.keep_ratio()); !status.ok()) {
      return status;
    }
    to.keep_ratio = from.keep_ratio();
  }
  if (from.has_codec()) {
    to.codec = kvstore::parse_codec(from.codec());
    if (!to.codec) {
      return invalid_argument(key + ".codec must be one of " + kvstore::codec_names() +
                              ", or two of them for keys / values, got '" + from.codec() + "'");
    }
    if (to.codec->k == kernels::KvFormat::kToken && to.last_layer > 0) {
      return invalid_argument(key + ".codec: token is for layer 0 only");
    }
  }
  return to;
}

}  // namespace

Result<kvstore::KvPolicy> to_kv_policy(const KvPolicy& policy) {
  kvstore::KvPolicy out;
  const auto profile = kvstore::parse_profile(policy.profile());
  if (!profile) {
    return invalid_argument("kv.policy.profile must be one of " + profile_names() + ", got '" +
                            policy.profile() + "'");
  }
  out.profile = *profile;
  if (policy.has_ratio() && policy.has_max_bytes()) {
    return invalid_argument("kv.policy.ratio and kv.policy.max_bytes are both set");
  }
  if (policy.has_ratio()) {
    if (Status status = check_share("kv.policy.ratio", policy.ratio()); !status.ok()) return status;
    out.ratio = policy.ratio();
  }
  out.max_bytes = static_cast<std::uint64_t>(policy.max_bytes());
  out.sinks = policy.sinks();
  out.recent = policy.recent();
  out.window = policy.window();
  if (Status status = check_share("kv.policy.lazy_threshold", policy.lazy_threshold());
      !status.ok()) {
    return status;
  }
  out.lazy_threshold = policy.lazy_threshold();
  out.lazy_test = policy.lazy_test() == KvPolicy::DECODE ? kvstore::LazyTest::kDecode
                                                         : kvstore::LazyTest::kPrefill;
  for (int i = 0; i < policy.overrides_size(); ++i) {
    auto converted =
        to_override(policy.overrides(i), "kv.policy.overrides[" + std::to_string(i) + "]");
    if (!converted.ok()) return converted.status();
    out.overrides.push_back(std::move(*converted));
  }
  return out;
}

}  // namespace spindle::config
