#include "cluster/comm/backoff.h"

#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <thread>

namespace spindle::comm {
namespace {

using std::chrono::microseconds;

constexpr microseconds kMaxSleepWhileSending{200};
constexpr unsigned long kTimerSlackNs = 1000;

}  // namespace

std::chrono::nanoseconds sleep_after(const BackoffPolicy& policy, std::chrono::nanoseconds waited,
                                     bool keep_moving) {
  using std::chrono::nanoseconds;
  if (waited < policy.spin) return nanoseconds::zero();
  nanoseconds longest = policy.max_sleep;
  if (keep_moving) longest = std::min<nanoseconds>(longest, kMaxSleepWhileSending);
  return std::clamp<nanoseconds>(waited / policy.wait_share,
                                 std::min<nanoseconds>(policy.min_sleep, longest), longest);
}

Backoff::Backoff(BackoffPolicy policy) : policy_(policy), started_(Clock::now()) {}

void Backoff::restart() { started_ = Clock::now(); }

std::chrono::nanoseconds Backoff::yield_or(Deadline deadline, bool keep_moving) {
  const auto wanted = sleep_after(policy_, Clock::now() - started_, keep_moving);
  if (wanted.count() == 0) {
    ::sched_yield();
    return wanted;
  }
  if (!slept_) {
    ::prctl(PR_SET_TIMERSLACK, kTimerSlackNs, 0, 0, 0);
    slept_ = true;
  }
  return std::min<std::chrono::nanoseconds>(wanted, deadline.remaining());
}

void Backoff::pause(Deadline deadline, bool keep_moving) {
  std::this_thread::sleep_for(yield_or(deadline, keep_moving));
}

}  // namespace spindle::comm
