#pragma once
// The ranks' exchange of budget reports and plans over the device group: an all-gather of reports,
// rank 0's decision, a broadcast of the plan in force. It has a thread of its own, so that no stage
// waits for another to come as far as it is.
//
// Thread-safety: start(), stop() and set_decide() from one thread; report() and await() from the
// stage's; is_busy() from any.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <thread>

#include "cluster/comm/device_group.h"
#include "cluster/coordinator/budget_messages.h"

namespace spindle::worker {

class BudgetExchange {
 public:
  // On rank 0: from the reports of all ranks to the plan in force, which may be a new one. Called
  // on the exchange's thread.
  using Decide =
      std::function<Result<coordinator::BudgetPlan>(std::span<const coordinator::BudgetReport>)>;

  // Does not own the group, which outlives it. An exchange that takes longer than `timeout` fails.
  BudgetExchange(comm::DeviceGroup& device, std::chrono::milliseconds timeout);
  ~BudgetExchange();
  BudgetExchange(const BudgetExchange&) = delete;
  BudgetExchange& operator=(const BudgetExchange&) = delete;

  void set_decide(Decide decide) { decide_ = std::move(decide); }
  void start();
  // Waits for exchanges that this rank has reported for.
  void stop();
  // Whether there are any.
  bool is_busy();

  // This rank's part of the next exchange; every rank makes as many. An earlier exchange's failure
  // is its answer.
  Status report(const coordinator::BudgetReport& report);
  // Waits until the plan of `epoch` is here, or one after it. INTERNAL when that one takes effect
  // after `step`: the ranks do not agree on when it applies.
  Status await(std::uint64_t epoch, std::uint64_t step);

 private:
  void run();
  Status exchange(const coordinator::BudgetReport& mine);

  comm::DeviceGroup& device_;
  const std::chrono::milliseconds timeout_;
  Decide decide_;
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::deque<coordinator::BudgetReport> reports_;
  coordinator::BudgetPlan plan_;
  Status failure_;
  bool exchanging_ = false;
  bool stopping_ = false;
};

}  // namespace spindle::worker
