#include "kvstore/plan/kv_kind.h"

namespace spindle::kvstore {
namespace {

using kernels::KvFormat;

constexpr int kFormats = static_cast<int>(KvFormat::kToken) + 1;
static_assert(kPlanKinds == (static_cast<int>(KvMode::kStream) + 1) * kFormats * kFormats);

HeadPlan plan_of(int kind) {
  HeadPlan plan;
  plan.mode = static_cast<KvMode>(kind / (kFormats * kFormats));
  plan.codec.k = static_cast<KvFormat>(kind / kFormats % kFormats);
  plan.codec.v = static_cast<KvFormat>(kind % kFormats);
  return plan;
}

bool is_kind(int kind) { return kind >= 0 && kind < kPlanKinds; }

}  // namespace

KvForm form_of(KvFormat format) {
  switch (format) {
    case KvFormat::kRaw:
      return KvForm::kRaw;
    case KvFormat::kInt4:
      return KvForm::kInt4;
    case KvFormat::kKivi4:
    case KvFormat::kKivi2:
      return KvForm::kKivi;
    case KvFormat::kLloyd1:
    case KvFormat::kLloyd2:
    case KvFormat::kLloyd3:
    case KvFormat::kLloyd4:
      return KvForm::kLloyd;
    case KvFormat::kCodebook:
      return KvForm::kCodebook;
    case KvFormat::kToken:
      return KvForm::kToken;
  }
  return KvForm::kRaw;
}

int plan_kind(const HeadPlan& plan) {
  return (static_cast<int>(plan.mode) * kFormats + static_cast<int>(plan.codec.k)) * kFormats +
         static_cast<int>(plan.codec.v);
}

std::string plan_kind_name(int kind) {
  if (!is_kind(kind)) return {};
  const HeadPlan plan = plan_of(kind);
  std::string name = plan_name(plan);
  name.resize(name.find(' '));  // the mode
  name += ' ';
  name += format_name(plan.codec.k);
  if (plan.codec.v != plan.codec.k) {
    name += '/';
    name += format_name(plan.codec.v);
  }
  return name;
}

int parse_plan_kind_name(std::string_view name) {
  const std::size_t space = name.find(' ');
  if (space == std::string_view::npos) return -1;
  const auto codec = parse_codec(name.substr(space + 1));
  if (!codec) return -1;
  for (const KvMode mode : {KvMode::kFull, KvMode::kEvict, KvMode::kStream}) {
    const int kind = plan_kind({.mode = mode, .codec = *codec});
    if (plan_kind_name(kind) == name) return kind;
  }
  return -1;
}

std::string plan_group_name(int kind) {
  if (!is_kind(kind)) return {};
  const HeadPlan plan = plan_of(kind);
  static constexpr std::array<std::string_view, 3> kModes{"full", "evict", "stream"};
  std::string name(kModes[static_cast<std::size_t>(plan.mode)]);
  const KvForm form = form_of(plan.codec.k);
  name += '_';
  name += form == form_of(plan.codec.v) ? kKvFormNames[static_cast<std::size_t>(form)]
                                        : std::string_view("mixed");
  return name;
}

}  // namespace spindle::kvstore
