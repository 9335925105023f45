#pragma once
// HostGroup: control messages between the ranks of one cluster, in host memory. Plans, results,
// heartbeats and everything exchanged at start-up travel here; tensors use DeviceGroup.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/comm/channel.h"
#include "cluster/comm/frame.h"
#include "cluster/comm/message.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

namespace spindle::comm {

// One rank's end of the group. This class checks arguments and limits, frames and verifies every
// message, and builds the collectives; a body (local_group.h, mpi_world.h) only moves frames.
//
// Sending is buffered: send() returns once the group has taken a copy, not when the peer has it, so
// two ranks that send to each other never deadlock. Buffers are bounded (kMaxUnreceivedBytes per
// channel); a full one makes send() wait. Sending to oneself works like sending to anybody else.
//
// Errors: DEADLINE_EXCEEDED (nothing was consumed; the call may be repeated), UNAVAILABLE after
// shutdown() or abort(), INVALID_ARGUMENT and TOO_LARGE for the caller's mistakes, INTERNAL for a
// corrupt or foreign frame or collectives called in different orders.
//
// Thread-safety: send, recv, try_recv, shutdown and abort may be called from any thread at any
// time. Two threads receiving on one channel each get some of the messages. The collectives share
// one channel: one thread at a time, and every rank calls the same ones in the same order. After a
// collective failed on any rank the group's collectives are out of step and stay so.
class HostGroup {
 public:
  virtual ~HostGroup() = default;
  HostGroup(const HostGroup&) = delete;
  HostGroup& operator=(const HostGroup&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  std::uint32_t epoch() const { return epoch_; }

  Status send(int dest, Channel channel, std::string_view bytes, Deadline deadline);
  Status send(int dest, Channel channel, std::span<const std::byte> bytes, Deadline deadline);

  // `source` is a rank or kAnySource.
  Result<Message> recv(int source, Channel channel, Deadline deadline);
  // Empty when no complete message is there; never waits.
  Result<std::optional<Message>> try_recv(int source, Channel channel);

  // On `root` reads `bytes`, elsewhere replaces them.
  Status broadcast(std::string& bytes, int root, Deadline deadline);
  // Element r is what rank r gave. Contributions may differ in size.
  Result<std::vector<std::string>> all_gather(std::string_view bytes, Deadline deadline);
  Status barrier(Deadline deadline);

  // Ends every pending and future wait of *this rank* with UNAVAILABLE and `why`: how threads that
  // sit in recv() are asked to leave. Peers notice nothing.
  virtual void shutdown(std::string_view why) = 0;

  // Ends the whole cluster because this rank cannot go on. The MPI body prints the rank and `why`
  // to stderr, ends the job with `exit_code` and never returns. The in-process body ends every
  // pending and future wait of every rank with UNAVAILABLE and `why`, and returns.
  virtual void abort(int exit_code, std::string_view why) = 0;

  // What a body implements, public so that a decorator can wrap another group.
  // `frame` comes from encode_frame() and is at most kMaxFrameBytes.
  virtual Status send_frame(int dest, Channel channel, std::string frame, Deadline deadline) = 0;
  // An undecoded frame, or empty when none was complete at the deadline. Looks at least once even
  // if the deadline has passed, and refuses frames over kMaxFrameBytes before it allocates.
  virtual Result<std::optional<Message>> recv_frame(int source, Channel channel,
                                                    Deadline deadline) = 0;

 protected:
  // All ranks of a cluster share `epoch`; frames of another one are refused.
  HostGroup(int rank, int size, std::uint32_t epoch);

 private:
  enum class Collective : std::uint32_t { kBroadcast = 1, kAllGather = 2, kBarrier = 3 };

  Status check_peer(int peer, std::string_view role) const;
  std::string collective_header(Collective op, int root) const;
  Status send_collective(int dest, const std::string& header, std::string_view bytes,
                         Deadline deadline);
  Result<std::string> recv_collective(int source, const std::string& header, Deadline deadline);
  Result<std::vector<std::string>> gather_from_all(Collective op, std::string_view bytes,
                                                   Deadline deadline);

  const int rank_;
  const int size_;
  const std::uint32_t epoch_;
  std::uint64_t collective_sequence_ = 0;  // collectives started; touched only by their one thread
};

}  // namespace spindle::comm
