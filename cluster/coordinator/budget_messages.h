#pragma once
// What ranks tell each other to balance KV between stages, as bytes of a fixed size for the device
// group's collectives: every rank gives a BudgetReport, rank 0 broadcasts a BudgetPlan.
//
// On the wire: little-endian; magic, version, the fields in order, a checksum (64-bit FNV-1a of all
// bytes before it). Decoding answers INVALID_ARGUMENT for another size, magic or version, a wrong
// checksum, or values that no rank sends.
//
// Thread-safety: plain values and pure functions.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "kernels/core/status.h"

namespace spindle::coordinator {

inline constexpr std::uint32_t kMaxBudgetStages = 256;
inline constexpr std::uint8_t kMaxBudgetLevels = 128;

// Of one stage, after `step`.
struct BudgetReport {
  std::uint32_t stage = 0;
  std::uint32_t n_stages = 1;
  std::uint64_t step = 0;   // the last one carried out; 0: none yet
  std::uint64_t epoch = 0;  // of the plan in effect; 0: none yet
  std::uint64_t capacity_bytes = 0;
  std::uint64_t used_bytes = 0;  // pages held
  std::uint64_t reserved_bytes =
      0;  // promised to open sequences beside those; together <= capacity
  // Totals since the start over the boundaries of prompts: what the balancer's curves said of them
  // on this stage, and what the store held of them afterwards.
  std::uint64_t planned_bytes = 0;
  std::uint64_t kept_bytes = 0;
  bool operator==(const BudgetReport&) const = default;
};

enum class BudgetReason : std::uint8_t {
  kPressure,  // requests wait for memory: some stages compress harder
  kRelief,    // there is room to compress less
};

// The level of every stage from a numbered step on. Levels are indices of the balancer's ladder,
// light to strong.
struct BudgetPlan {
  std::uint64_t epoch = 0;  // 1 for the first plan, then one more each; 0: there is none yet
  std::uint64_t effective_step = 0;
  std::uint32_t n_stages = 1;
  BudgetReason reason = BudgetReason::kPressure;
  std::array<std::uint8_t, kMaxBudgetStages> levels = {};  // 0 from n_stages on
  bool operator==(const BudgetPlan&) const = default;
};
static_assert(std::is_trivially_copyable_v<BudgetReport>);
static_assert(std::is_trivially_copyable_v<BudgetPlan>);

inline constexpr std::size_t kBudgetReportBytes = 4 + 4 + 2 * 4 + 7 * 8 + 8;
inline constexpr std::size_t kBudgetPlanBytes = 4 + 4 + 2 * 8 + 4 + 1 + kMaxBudgetStages + 8;

std::array<std::byte, kBudgetReportBytes> encode(const BudgetReport& report);
std::array<std::byte, kBudgetPlanBytes> encode(const BudgetPlan& plan);
Result<BudgetReport> decode_budget_report(std::span<const std::byte> bytes);
Result<BudgetPlan> decode_budget_plan(std::span<const std::byte> bytes);

}  // namespace spindle::coordinator
