#pragma once
// DeviceGroup over NCCL, for stages on different GPUs. Internal to spindle_comm_nccl; users see
// make_nccl_device_group() (cuda_device_group.h).
//
// Each edge of the pipeline (stage i to i + 1) has a communicator of its own and its own
// high-priority stream on either side, so that a transfer never waits for another edge's. A tensor
// is copied on the device into a staging slot first: the caller's next step may overwrite its
// memory at once. A receive starts when the compute stream has done what it had before the call.
// Collectives use a communicator of all ranks and a stream of their own, and wait for nothing that
// computes.
//
// Deadlines: a tensor's call returns when its work is enqueued. Work that is not done when its
// deadline has passed, and asynchronous errors of NCCL, are found by the next call on the group, by
// flush() and by the caller's own wait for the device; all communicators are then aborted, so that
// no kernel of NCCL keeps the device busy. A peer that died is found by its heartbeat
// (PeerMonitor).

#include <nccl.h>

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cluster/comm/device_group.h"
#include "cluster/comm/host_group.h"
#include "cluster/comm/nccl_library.h"
#include "kernels/core/cuda_context.h"

struct CUevent_st;

namespace spindle::comm {

class NcclDeviceGroup final : public DeviceGroup {
 public:
  // Collective: every rank of `host` calls it. Connects and warms every edge, so that the first
  // request does not pay for it. `max_tensor_bytes` bounds what one call moves.
  static Result<std::unique_ptr<NcclDeviceGroup>> create(HostGroup& host,
                                                         const CudaContext& context,
                                                         std::size_t max_tensor_bytes,
                                                         Deadline deadline);
  ~NcclDeviceGroup() override;

  Status send(int dest, std::span<const std::byte> data, Deadline deadline) override;
  Status recv(int source, std::span<std::byte> out, Deadline deadline) override;
  bool recv_waits() const override { return false; }
  Status flush(Deadline deadline) override;
  Status all_gather(std::span<const std::byte> mine, std::span<std::byte> all,
                    Deadline deadline) override;
  Status broadcast(std::span<std::byte> data, int root, Deadline deadline) override;
  void abort(std::string_view why) override;
  // Sends from the moment that their tensor was computed, the receiver's lateness included.
  // Receives are not timed: their kernels mostly wait for the sender, and so does the stream that
  // computes, which is where that shows.
  TensorTimes tensor_times() override;

 private:
  static constexpr std::size_t kSlots = 4;
  static constexpr std::size_t kMaxCollectiveBytes = 1 << 20;

  // A communicator with the stream its operations run on.
  struct Link {
    ncclComm_t comm = nullptr;
    CudaStream stream = nullptr;
    int peer = -1;  // rank within the communicator
  };
  // Staging of one direction.
  struct Staging {
    DeviceBuffer memory;                           // [kSlots][max_tensor_bytes]
    std::array<CUevent_st*, kSlots> filled = {};   // the slot's content is there
    std::array<CUevent_st*, kSlots> drained = {};  // the slot may be filled again
    std::array<bool, kSlots> used = {};
    std::size_t next = 0;
  };
  // When the send of a slot ran.
  struct SendTimer {
    CUevent_st* began = nullptr;
    CUevent_st* ended = nullptr;
    bool open = false;
  };
  struct Pending {
    CUevent_st* event;  // borrowed from a Staging
    Deadline deadline;
    std::string what;
  };

  NcclDeviceGroup(int rank, int size, const CudaContext& context, std::size_t max_tensor_bytes);
  Status connect(HostGroup& host, Deadline deadline);
  Status make_link(Link& link, const ncclUniqueId& id, int n_ranks, int rank, int peer,
                   Deadline deadline);
  Status make_staging(Staging& staging, std::string_view what);
  Status warm_up(Deadline deadline);
  // Waits until a non-blocking call on the communicator has been accepted.
  Status settle(ncclComm_t comm, ncclResult_t result, std::string_view what, Deadline deadline);
  // Remembers work until its event; an event that is recorded anew stands for the later work alone.
  void remember(CUevent_st* event, Deadline deadline, std::string what);
  void count_send(SendTimer& timer);
  template <typename Enqueue>
  Status collect(std::span<const std::byte> in, std::span<std::byte> out, std::string_view what,
                 Deadline deadline, Enqueue enqueue);
  // Asynchronous errors and passed deadlines of earlier tensors.
  Status check_health();
  Status fail(Status status);
  // Aborts all communicators, and waits for that only so long: NCCL may hang in it when a peer is
  // gone, and the job must end all the same.
  void abort_communicators();

  const CudaContext& context_;
  const std::size_t max_tensor_bytes_;
  std::shared_ptr<const NcclLibrary> nccl_;
  Link world_;
  Link to_next_;
  Link from_previous_;
  Staging sending_;
  Staging receiving_;
  CUevent_st* computed_ = nullptr;  // what a receive starts behind
  // Of the collectives: what goes in, then what comes out.
  DeviceBuffer collected_;
  PinnedBuffer collected_host_;
  CUevent_st* collective_done_ = nullptr;
  std::array<SendTimer, kSlots> send_timers_ = {};
  double send_us_ = 0;
  std::deque<Pending> pending_;  // in order of enqueueing

  std::mutex abort_mutex_;
  std::atomic<bool> aborted_{false};
  std::string abort_reason_;  // guarded by abort_mutex_
};

}  // namespace spindle::comm
