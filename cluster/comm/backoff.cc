#include "cluster/comm/backoff.h"

#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <thread>

namespace spindle::comm {
namespace {

using std::chrono::microseconds;

constexpr microseconds kMaxSleepWhileSending{200};
constexpr int kWaitShare = 64;
constexpr unsigned long kTimerSlackNs = 1000;

}  // namespace

std::chrono::nanoseconds sleep_after(const BackoffPolicy& policy, std::chrono::nanoseconds waited,
                                     bool keep_moving) {
  using std::chrono::nanoseconds;
  if (waited < policy.spin) return nanoseconds::zero();
  nanoseconds longest = policy.max_sleep;
  if (keep_moving) longest = std::min<nanoseconds>(longest, kMaxSleepWhileSending);
  return std::clamp<nanoseconds>(waited / kWaitShare,
                                 std::min<nanoseconds>(policy.min_sleep, longest), longest);
}

Backoff::Backoff(BackoffPolicy policy) : policy_(policy), started_(Clock::now()) {}

void Backoff::restart() { started_ = Clock::now(); }

void Backoff::pause(Deadline deadline, bool keep_moving) {
  const auto wanted = sleep_after(policy_, Clock::now() - started_, keep_moving);
  if (wanted.count() == 0) {
    ::sched_yield();
    return;
  }
  if (!slept_) {
    ::prctl(PR_SET_TIMERSLACK, kTimerSlackNs, 0, 0, 0);
    slept_ = true;
  }
  std::this_thread::sleep_for(std::min<Clock::duration>(wanted, deadline.remaining()));
}

}  // namespace spindle::comm
