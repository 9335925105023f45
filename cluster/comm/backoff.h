#pragma once
// How a thread waits for something that can only be polled.

#include <chrono>

#include "kernels/core/deadline.h"

namespace spindle::comm {

// How eagerly the threads of a process wait: a wake-up costs several microseconds of a core, in
// virtual machines more, and as much of what is waited for.
enum class Waiting {
  kSparing,   // every core has a thread that computes
  kEager,     // those that wait have cores to themselves
  kSpinning,  // there are cores to spend: what every step waits for is waited for without sleep
};
inline constexpr int kEagerShare = 64;
inline constexpr int kSparingShare = 16;
// Of kSpinning: so long after a channel's last message. Longer than most steps of decode; beyond it
// the cluster is idle, or its steps are so long that a sleep does not matter.
inline constexpr std::chrono::milliseconds kSpinAfterMessage{20};

struct BackoffPolicy {
  std::chrono::microseconds spin{50};  // yield, do not sleep, for this long
  std::chrono::microseconds min_sleep{20};
  std::chrono::microseconds max_sleep{500};
  int wait_share = kEagerShare;  // a sleep is this part of the time waited so far
};

// How long to sleep after `waited` without an event; zero: yield instead. `keep_moving`: this
// process has sends under way that progress only while somebody polls, so the sleep stays short.
std::chrono::nanoseconds sleep_after(const BackoffPolicy& policy, std::chrono::nanoseconds waited,
                                     bool keep_moving);

// First yields for a moment, so that a reply that is on its way costs no sleep. Then sleeps for
// 1 / wait_share of the time waited so far, within the policy's bounds: the delay this adds to an
// event is that part of the wait for it at most (2 % or 6 %), and an idle thread wakes
// 1 / max_sleep times a second.
//
// Thread-safety: one thread. Lowers that thread's timer slack (the kernel's default of 50 us would
// triple the short sleeps) at the first sleep and leaves it so.
class Backoff {
 public:
  explicit Backoff(BackoffPolicy policy = {});

  // Yields or sleeps by sleep_after(), never beyond `deadline`.
  void pause(Deadline deadline, bool keep_moving);
  // The same, but leaves the sleep to the caller, who has something better to wait on: how long;
  // zero after it has yielded.
  std::chrono::nanoseconds yield_or(Deadline deadline, bool keep_moving);
  // Something happened: wait eagerly again.
  void restart();

 private:
  using Clock = Deadline::Clock;

  BackoffPolicy policy_;
  Clock::time_point started_;
  bool slept_ = false;
};

}  // namespace spindle::comm
