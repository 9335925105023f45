#pragma once
// HostGroup over MPI. Internal to spindle_comm_mpi (includes mpi.h); users see it through MpiWorld.

#include <mpi.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cluster/comm/backoff.h"
#include "cluster/comm/host_group.h"
#include "cluster/comm/mailbox.h"
#include "cluster/comm/mpi_progress.h"

namespace spindle::comm {

using ChannelComms = std::array<MPI_Comm, kChannelCount>;

// One communicator per channel (not owned), so that a wait on one never sees another's messages.
// Everything is a matched probe, a non-blocking receive and a polling loop; messages to oneself go
// through a Mailbox and never touch MPI. A receive whose deadline passes while its data is under
// way stays here and is finished by the next recv_frame() that wants its source. A frame over the
// limit is refused and never received, so its sender cannot end cleanly any more.
//
// Needs MPI_THREAD_MULTIPLE and MPI_ERRORS_RETURN. Thread-safety: as HostGroup.
class MpiHostGroup final : public HostGroup {
 public:
  // `comms` are duplicates of one communicator; the group's rank and size are theirs.
  MpiHostGroup(const ChannelComms& comms, std::uint32_t epoch, MpiProgress& progress);

  void shutdown(std::string_view why) override;
  [[noreturn]] void abort(int exit_code, std::string_view why) override;

  Status send_frame(int dest, Channel channel, std::string frame, Deadline deadline) override;
  Result<std::optional<Message>> recv_frame(int source, Channel channel,
                                            Deadline deadline) override;

  // For the end of the job, after shutdown(): receives and drops whatever has arrived.
  void discard_arrived();
  // No receive is under way.
  bool idle();

 private:
  // A message that MPI is writing into `bytes`.
  struct Arriving {
    MPI_Request request;
    int source;
    std::string bytes;
  };
  struct Inbox {
    MPI_Comm comm = MPI_COMM_NULL;
    SendQueue* sends = nullptr;
    std::unique_ptr<Mailbox> from_self;
    std::atomic<Deadline::Clock::duration> last_message = {};  // when, of the clock
    std::mutex mutex;
    std::vector<Arriving> arriving;  // guarded by mutex; at most one per source
  };

  Result<std::optional<Message>> wait_frame(Inbox& inbox, int source, const BackoffPolicy& policy,
                                            Deadline deadline);
  Result<std::optional<Message>> poll(Inbox& inbox, int source);
  // Empty while the oldest matching message is still under way.
  static Result<std::optional<Message>> finish(Inbox& inbox, std::size_t index);
  static Result<bool> start_next(Inbox& inbox, int source);

  MpiProgress& progress_;
  StopFlag stop_;
  std::array<Inbox, kChannelCount> inboxes_;
};

// Prints rank and reason, ends the job through MPI_Abort, and the process by _exit if that does not
// return within 2 s.
[[noreturn]] void abort_job(int rank, int exit_code, std::string_view why);

}  // namespace spindle::comm
