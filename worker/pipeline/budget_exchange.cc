#include "worker/pipeline/budget_exchange.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/deadline.h"

namespace spindle::worker {

using coordinator::BudgetPlan;
using coordinator::BudgetReport;
using coordinator::kBudgetPlanBytes;
using coordinator::kBudgetReportBytes;

BudgetExchange::BudgetExchange(comm::DeviceGroup& device, std::chrono::milliseconds timeout)
    : device_(device), timeout_(timeout) {}

BudgetExchange::~BudgetExchange() { stop(); }

void BudgetExchange::start() {
  thread_ = std::thread([this] { run(); });
}

void BudgetExchange::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

bool BudgetExchange::is_busy() {
  const std::lock_guard lock(mutex_);
  return exchanging_ || !reports_.empty();
}

Status BudgetExchange::report(const BudgetReport& report) {
  const std::lock_guard lock(mutex_);
  if (!failure_.ok()) return failure_;
  reports_.push_back(report);
  changed_.notify_all();
  return ok_status();
}

Status BudgetExchange::await(std::uint64_t epoch, std::uint64_t step) {
  if (epoch == 0) return ok_status();
  std::unique_lock lock(mutex_);
  const bool is_here = changed_.wait_for(
      lock, timeout_, [&] { return plan_.epoch >= epoch || !failure_.ok() || stopping_; });
  if (!failure_.ok()) return failure_;
  if (!is_here || plan_.epoch < epoch) {
    return deadline_exceeded("budget plan " + std::to_string(epoch) + " of step " +
                             std::to_string(step) + " did not come");
  }
  if (plan_.epoch > epoch || plan_.effective_step <= step) return ok_status();
  return internal_error("step " + std::to_string(step) + " follows budget plan " +
                        std::to_string(epoch) + ", which takes effect at step " +
                        std::to_string(plan_.effective_step));
}

void BudgetExchange::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || !reports_.empty(); });
    // What every rank has promised is done also when it stops: the others wait for it.
    if (reports_.empty()) return;
    const BudgetReport mine = reports_.front();
    reports_.pop_front();
    exchanging_ = true;
    lock.unlock();
    const Status status = exchange(mine);
    lock.lock();
    exchanging_ = false;
    if (status.ok()) continue;
    failure_ = status.with_context("exchanging KV budgets");
    changed_.notify_all();
    return;
  }
}

Status BudgetExchange::exchange(const BudgetReport& mine) {
  const Deadline deadline = Deadline::after(timeout_);
  const auto bytes = coordinator::encode(mine);
  std::vector<std::byte> all(bytes.size() * static_cast<std::size_t>(device_.size()));
  if (Status status = device_.all_gather(bytes, all, deadline); !status.ok()) return status;
  std::array<std::byte, kBudgetPlanBytes> plan_bytes{};
  Status decided;
  if (device_.rank() == 0) {
    std::vector<BudgetReport> reports;
    for (int rank = 0; rank < device_.size() && decided.ok(); ++rank) {
      auto report = coordinator::decode_budget_report(std::span(all).subspan(
          static_cast<std::size_t>(rank) * kBudgetReportBytes, kBudgetReportBytes));
      decided = report.status();
      if (report.ok()) reports.push_back(*report);
    }
    if (decided.ok()) {
      auto plan = decide_(reports);
      decided = plan.status();
      if (plan.ok()) plan_bytes = coordinator::encode(*plan);
    }
    // Others see a plan that cannot be read, and fail too.
  }
  if (Status status = device_.broadcast(plan_bytes, 0, deadline); !status.ok()) return status;
  if (!decided.ok()) return decided;
  auto plan = coordinator::decode_budget_plan(plan_bytes);
  if (!plan.ok()) return plan.status();
  const std::lock_guard lock(mutex_);
  plan_ = *plan;
  changed_.notify_all();
  return ok_status();
}

}  // namespace spindle::worker
