#pragma once
// SIGTERM, SIGINT and SIGUSR1 as calls on a thread of their own.

#include <functional>
#include <memory>

namespace spindle::worker {

// From construction to destruction the three signals do not end the process: the first calls
// `on_first`, every later one `on_more`, with the signal's name. mpirun forwards SIGTERM and
// SIGUSR1 to all ranks; SIGUSR1 does not make it count down to SIGKILL.
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
