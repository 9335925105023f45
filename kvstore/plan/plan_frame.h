#pragma once
// What the planners of the profiles share; for kvstore/plan only.
//
// Thread-safety: plain values and pure functions.

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "kvstore/plan/kv_plan.h"

namespace spindle::kvstore {

inline constexpr std::uint64_t kNoLimit = std::numeric_limits<std::uint64_t>::max();
inline constexpr kernels::KvCodec kRawCodec;
inline constexpr kernels::KvCodec kTokenCodec{kernels::KvFormat::kToken, kernels::KvFormat::kToken};
inline constexpr kernels::KvCodec kInt4Codec{kernels::KvFormat::kInt4, kernels::KvFormat::kInt4};
inline constexpr kernels::KvCodec kKivi4Codec{kernels::KvFormat::kKivi4, kernels::KvFormat::kKivi4};
inline constexpr kernels::KvCodec kKivi2Codec{kernels::KvFormat::kKivi2, kernels::KvFormat::kKivi2};
inline constexpr kernels::KvCodec kLloyd44{kernels::KvFormat::kLloyd4, kernels::KvFormat::kLloyd4};
inline constexpr kernels::KvCodec kLloyd32{kernels::KvFormat::kLloyd3, kernels::KvFormat::kLloyd2};
inline constexpr kernels::KvCodec kCodebookCodec{kernels::KvFormat::kCodebook,
                                                 kernels::KvFormat::kCodebook};

bool in_range(const HeadOverride& range, int layer, int kv_head);
bool is_simlayer(KvProfile profile);
bool is_global(KvProfile profile);  // one threshold over all layers and heads
std::int64_t lazy_window(const KvPolicy& policy);
KvSelector profile_selector(KvProfile profile);
// The distinct selectors of a policy over the heads of the model, overrides included; kNone alone
// when it scores nothing. A valid policy has one.
std::vector<KvSelector> policy_selectors(const KvPolicy& policy, const KvModel& model);

// The bytes a policy asks for, or its own.
struct PlanSize {
  bool limited = false;
  bool soft = false;        // not asked for: the smallest plan will do when it is out of reach
  std::uint64_t bytes = 0;  // packing waste included
  double ratio = 1.0;       // of the uncompressed bytes, before a soft size grew

  std::uint64_t budget(const KvModel& model) const;  // of plan_bytes
};
PlanSize plan_size(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                   std::int64_t n_tokens);

// The size of a level (kv_levels.h): `ratio`, softly, but never more than a request asked for; 0 is
// the policy's own size. Where that grows for a short prompt, levels grow in proportion, so that a
// stronger one stays smaller.
PlanSize level_size(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                    std::int64_t n_tokens, double ratio);

// One boundary, seen from the planners.
struct PlanFrame {
  const KvPolicy& policy;
  const KvModel& model;
  const ProfileTable* table;  // or null
  const BoundaryReport& report;
  KvSelector selector = KvSelector::kNone;
  double ratio = 1.0;  // what the budget is of the uncompressed bytes
  int recent = 0;
  bool later = false;  // see plan_boundary

  std::int64_t n_tokens() const { return report.n_tokens; }
  std::int64_t n_candidates() const { return report.n_candidates; }
  std::int64_t tail() const { return tail_length(recent, report.n_tokens); }
  int layer(std::size_t head) const { return static_cast<int>(head) / model.n_kv_heads; }
  const HeadErrors* errors(std::size_t head) const {
    return table == nullptr ? nullptr : &table->heads[head];
  }
  // Window tokens that are not in the tail.
  std::int64_t window_in_body() const;
  // What head `head` costs under `plan`: everything it holds, or, at a later boundary, what it
  // comes to hold.
  std::uint64_t cost(std::size_t head, const HeadPlan& plan) const;
  std::uint64_t cost(std::span<const HeadPlan> heads) const;
  // EVICT, or FULL when every candidate stays: complete sets need no positions.
  HeadPlan evict(kernels::KvCodec codec, std::int64_t n_keep) const;
  // STREAM, or FULL when the window leaves nothing to drop.
  HeadPlan stream(kernels::KvCodec codec, std::int64_t window) const;
  std::uint64_t tail_bytes() const;
};

// Gives the EVICT heads `heads` their n_keep: one threshold over their histograms, whole blocks, at
// most `budget` bytes together; n_keep is 0 everywhere when not even that fits.
void fill_global(const PlanFrame& frame, std::span<const std::size_t> heads, std::uint64_t budget,
                 std::vector<HeadPlan>& plan);

// The profile's plan before overrides, at most `budget` bytes; when it cannot be, its smallest.
std::vector<HeadPlan> plan_profile(const PlanFrame& frame, std::uint64_t budget);
std::vector<HeadPlan> plan_spindle(const PlanFrame& frame, std::uint64_t budget);
// n_keep of the EVICT heads of `plan` by the profile's rule.
void fill_evict(const PlanFrame& frame, std::uint64_t budget, std::vector<HeadPlan>& plan);

void apply_overrides(const PlanFrame& frame, std::vector<HeadPlan>& plan);

// With overrides and the longest tail that the budget allows; the smallest plan when out of reach.
struct SizedPlan {
  SequencePlan plan;
  std::uint64_t bytes = 0;  // of plan_bytes
};
SizedPlan plan_sized(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                     const BoundaryReport& report, std::uint64_t budget, double ratio);

// INTERNAL when the stages' report lacks what the policy's plan needs, INVALID_ARGUMENT for a table
// of another model.
Status check_report(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                    const BoundaryReport& report);
// plan_boundary for this size; the report is checked. At a later boundary layer_ratios (of each
// layer; empty: all have this size) says which layers were planned more lightly than this size:
// what they keep complete is charged at most its share, since the others must not pay for it.
Result<SequencePlan> plan_with_size(const KvPolicy& policy, const KvModel& model,
                                    const ProfileTable* table, const BoundaryReport& report,
                                    const PlanSize& size,
                                    std::span<const double> layer_ratios = {});

// The least bytes that a policy can be given for a prompt, packing waste included.
// n_ids as BoundaryReport::n_new_ids.
std::uint64_t floor_bytes(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                          std::int64_t n_tokens, std::int64_t n_ids);
// The error of a policy that asks for less.
Status below_floor(const KvPolicy& policy, const KvModel& model, std::int64_t n_tokens,
                   std::uint64_t floor);
bool never_compressed(const KvPolicy& policy, std::int64_t n_tokens);

}  // namespace spindle::kvstore
