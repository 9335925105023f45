#pragma once
// MpiWorld: this process as one rank of an mpirun job. Does not include mpi.h.

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "cluster/comm/backoff.h"
#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "kernels/core/status.h"

namespace spindle::comm {

struct MpiWorldOptions {
  // For MPI_Init_thread and the exchange that follows; afterwards the process exits.
  std::chrono::milliseconds init_timeout{60000};
  // For the other ranks to reach the end too.
  std::chrono::milliseconds finalize_timeout{5000};
  // Of a process that gives up in one of the two.
  int failure_exit_code = 70;
};

// From MPI_Init_thread to MPI_Finalize. Owns MPI, the communicators and this rank's two groups.
//
// The destructor ends both groups, waits until every rank has come as far and every send has
// arrived (messages nobody received are dropped), and finalizes. If the others do not come within
// finalize_timeout, or MPI_Finalize hangs, it prints why and ends the process with _exit: a process
// that stays would keep the whole job alive.
//
// Thread-safety: init() and the destructor from the main thread, the latter after every other
// thread has stopped using the groups; the others from any thread.
class MpiWorld {
 public:
  // UNAVAILABLE if the MPI library cannot serve several threads or is running already. If the
  // other ranks do not answer in time the process exits.
  static Result<std::unique_ptr<MpiWorld>> init(const MpiWorldOptions& options = {});
  ~MpiWorld();
  MpiWorld(const MpiWorld&) = delete;
  MpiWorld& operator=(const MpiWorld&) = delete;

  int rank() const;
  int size() const;
  // Among the ranks on this machine, for choosing a GPU.
  int local_rank() const;
  int local_size() const;
  const std::string& host_name() const;

  // kEager until then.
  void set_waiting(Waiting waiting);

  HostGroup& host();
  DeviceGroup& device();

 private:
  struct State;
  explicit MpiWorld(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace spindle::comm
