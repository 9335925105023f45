#pragma once
// Coarse names for what is kept and how: the form that bytes lie in, and the kind of a head's plan.
// For reports, which add up over sequences; both are small numbers with fixed names.
//
// Thread-safety: plain values and pure functions.

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "kvstore/plan/kv_plan.h"

namespace spindle::kvstore {

enum class KvForm : std::uint8_t {
  kRaw,       // full precision
  kWindow,    // full precision of heads that stream: sinks and recent tokens
  kInt4,      // one scale and minimum for each token
  kKivi,      // 4 or 2 bits
  kLloyd,     // 1 to 4 bits, means included
  kCodebook,  // entries and references
  kToken,     // token ids, and entries by id
};
inline constexpr std::size_t kKvForms = 7;
inline constexpr std::array<std::string_view, kKvForms> kKvFormNames{
    "raw", "window", "int4", "kivi", "lloyd", "codebook", "token"};
using FormBytes = std::array<std::uint64_t, kKvForms>;

KvForm form_of(kernels::KvFormat format);  // never kWindow

// Mode and codec of a plan, sizes left out: a number below kPlanKinds.
inline constexpr int kPlanKinds = 3 * 10 * 10;
int plan_kind(const HeadPlan& plan);
// "FULL raw", "EVICT lloyd4", "FULL lloyd3/lloyd2"; "" for a number that is no kind.
std::string plan_kind_name(int kind);
// The other way round; -1 for anything else.
int parse_plan_kind_name(std::string_view name);
// The same, coarser, for labels whose values must be few: mode, and the form of the keys, or
// "mixed" where the values have another one: "evict_lloyd". At most 21 names, and "" as above.
std::string plan_group_name(int kind);

}  // namespace spindle::kvstore
