#include "cluster/coordinator/budget_messages.h"

#include <algorithm>
#include <string>

namespace spindle::coordinator {
namespace {

constexpr std::uint32_t kReportMagic = 0x52425053;  // "SPBR"
constexpr std::uint32_t kPlanMagic = 0x50425053;    // "SPBP"
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kChecksumBytes = 8;

std::uint64_t checksum(std::span<const std::byte> bytes) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const std::byte byte : bytes) {
    hash = (hash ^ std::to_integer<std::uint64_t>(byte)) * 0x100000001b3;
  }
  return hash;
}

class Writer {
 public:
  explicit Writer(std::span<std::byte> out) : out_(out) {}
  template <typename T>
  void put(T value) {
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      out_[at_++] = static_cast<std::byte>(static_cast<std::uint64_t>(value) >> (8 * i));
    }
  }
  void seal() { put(checksum(out_.first(at_))); }

 private:
  std::span<std::byte> out_;
  std::size_t at_ = 0;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> in) : in_(in) {}
  template <typename T>
  T take() {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      value |= std::to_integer<std::uint64_t>(in_[at_++]) << (8 * i);
    }
    return static_cast<T>(value);
  }

 private:
  std::span<const std::byte> in_;
  std::size_t at_ = 0;
};

Status check_frame(std::span<const std::byte> bytes, std::size_t size, std::uint32_t magic,
                   const std::string& name) {
  if (bytes.size() != size) {
    return invalid_argument(name + " of " + std::to_string(bytes.size()) + " bytes, not " +
                            std::to_string(size));
  }
  Reader reader(bytes);
  if (reader.take<std::uint32_t>() != magic) return invalid_argument("these bytes are no " + name);
  if (const auto version = reader.take<std::uint32_t>(); version != kVersion) {
    return invalid_argument(name + " of version " + std::to_string(version) +
                            ": all ranks must run the same build");
  }
  const std::span<const std::byte> covered = bytes.first(size - kChecksumBytes);
  Reader sum(bytes.subspan(covered.size()));
  if (sum.take<std::uint64_t>() != checksum(covered)) {
    return invalid_argument(name + " with a wrong checksum");
  }
  return ok_status();
}

bool is_valid(const BudgetReport& report) {
  return report.n_stages >= 1 && report.n_stages <= kMaxBudgetStages &&
         report.stage < report.n_stages && report.used_bytes <= report.capacity_bytes &&
         report.reserved_bytes <= report.capacity_bytes - report.used_bytes;
}

bool is_valid(const BudgetPlan& plan) {
  if (plan.n_stages < 1 || plan.n_stages > kMaxBudgetStages) return false;
  if (plan.reason > BudgetReason::kRelief) return false;
  const auto unused = plan.levels.begin() + plan.n_stages;
  return std::all_of(plan.levels.begin(), unused,
                     [](std::uint8_t level) { return level < kMaxBudgetLevels; }) &&
         std::all_of(unused, plan.levels.end(), [](std::uint8_t level) { return level == 0; });
}

}  // namespace

std::array<std::byte, kBudgetReportBytes> encode(const BudgetReport& report) {
  std::array<std::byte, kBudgetReportBytes> bytes;
  Writer writer(bytes);
  writer.put(kReportMagic);
  writer.put(kVersion);
  writer.put(report.stage);
  writer.put(report.n_stages);
  writer.put(report.step);
  writer.put(report.epoch);
  writer.put(report.capacity_bytes);
  writer.put(report.used_bytes);
  writer.put(report.reserved_bytes);
  writer.put(report.planned_bytes);
  writer.put(report.kept_bytes);
  writer.seal();
  return bytes;
}

Result<BudgetReport> decode_budget_report(std::span<const std::byte> bytes) {
  Status status = check_frame(bytes, kBudgetReportBytes, kReportMagic, "budget report");
  if (!status.ok()) return status;
  Reader reader(bytes.subspan(sizeof(kReportMagic) + sizeof(kVersion)));
  BudgetReport report;
  report.stage = reader.take<std::uint32_t>();
  report.n_stages = reader.take<std::uint32_t>();
  report.step = reader.take<std::uint64_t>();
  report.epoch = reader.take<std::uint64_t>();
  report.capacity_bytes = reader.take<std::uint64_t>();
  report.used_bytes = reader.take<std::uint64_t>();
  report.reserved_bytes = reader.take<std::uint64_t>();
  report.planned_bytes = reader.take<std::uint64_t>();
  report.kept_bytes = reader.take<std::uint64_t>();
  if (!is_valid(report)) {
    return invalid_argument("budget report of stage " + std::to_string(report.stage) + " of " +
                            std::to_string(report.n_stages) + " with figures that cannot be");
  }
  return report;
}

std::array<std::byte, kBudgetPlanBytes> encode(const BudgetPlan& plan) {
  std::array<std::byte, kBudgetPlanBytes> bytes;
  Writer writer(bytes);
  writer.put(kPlanMagic);
  writer.put(kVersion);
  writer.put(plan.epoch);
  writer.put(plan.effective_step);
  writer.put(plan.n_stages);
  writer.put(static_cast<std::uint8_t>(plan.reason));
  for (const std::uint8_t level : plan.levels) writer.put(level);
  writer.seal();
  return bytes;
}

Result<BudgetPlan> decode_budget_plan(std::span<const std::byte> bytes) {
  Status status = check_frame(bytes, kBudgetPlanBytes, kPlanMagic, "budget plan");
  if (!status.ok()) return status;
  Reader reader(bytes.subspan(sizeof(kPlanMagic) + sizeof(kVersion)));
  BudgetPlan plan;
  plan.epoch = reader.take<std::uint64_t>();
  plan.effective_step = reader.take<std::uint64_t>();
  plan.n_stages = reader.take<std::uint32_t>();
  plan.reason = static_cast<BudgetReason>(reader.take<std::uint8_t>());
  for (std::uint8_t& level : plan.levels) level = reader.take<std::uint8_t>();
  if (!is_valid(plan)) {
    return invalid_argument("budget plan " + std::to_string(plan.epoch) + " for " +
                            std::to_string(plan.n_stages) + " stages with values out of range");
  }
  return plan;
}

}  // namespace spindle::coordinator
