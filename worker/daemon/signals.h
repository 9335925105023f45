#pragma once
// SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 as calls on a thread of their own.

#include <functional>
#include <memory>

namespace spindle::worker {

// From construction to destruction these signals do not end the process: the first calls
// `on_first`, every later one `on_more`, with the signal's name. mpirun forwards them to all ranks
// but for SIGINT, and after SIGTERM it counts down to SIGKILL. There are builds of Open MPI 4.1.6
// (seen on Ubuntu 24.04) whose mpirun catches SIGUSR1 and forwards only SIGUSR2.
//
// Thread-safety: callbacks run on the watcher's thread, one at a time, never after the destructor.
class SignalWatcher {
 public:
  using Callback = std::function<void(const char* signal_name)>;

  SignalWatcher(Callback on_first, Callback on_more);
  ~SignalWatcher();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace spindle::worker
