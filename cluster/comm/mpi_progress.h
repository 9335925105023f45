#pragma once
// What the MPI bodies share: error conversion, the stop flag of a group, and the sends that MPI has
// not finished yet. Internal to spindle_comm_mpi; includes mpi.h.

#include <mpi.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/comm/backoff.h"
#include "kernels/core/deadline.h"
#include "kernels/core/status.h"

namespace spindle::comm {

// OK, or UNAVAILABLE with the call's name and MPI's text.
Status mpi_status(int code, std::string_view call);

// Why a group no longer waits.
// Thread-safety: all functions, from any thread.
class StopFlag {
 public:
  // Only the first reason counts.
  void stop(Status reason);
  bool stopped() const { return stopped_.load(std::memory_order_acquire); }
  Status reason() const;

 private:
  std::atomic<bool> stopped_{false};
  mutable std::mutex mutex_;
  Status reason_;  // guarded by mutex_
};

// Sends of one communicator that MPI has started and not finished, with the memory they read from.
// MPI cannot be relied on to cancel a send, so a request and its memory stay here until it is done.
//
// Thread-safety: all functions, from any thread. Messages to one destination leave in the order of
// the calls.
class SendQueue {
 public:
  // At most `max_unsent_bytes` per destination wait here, or one message if it is larger.
  SendQueue(MPI_Comm comm, std::size_t max_unsent_bytes);

  // Starts the send if there is room and returns true; `owner` keeps `bytes` alive.
  Result<bool> try_send(int dest, std::span<const std::byte> bytes, std::shared_ptr<void> owner);
  // Lets go of what is done. `wait_for_lock`: false to skip when another thread is at it.
  void reap(bool wait_for_lock);
  bool empty() const { return n_pending_.load(std::memory_order_relaxed) == 0; }
  // The first error of a send that failed after try_send() had accepted it.
  Status failure() const;

 private:
  struct Pending {
    MPI_Request request;
    int dest;
    std::size_t n_bytes;
    std::shared_ptr<void> owner;
  };
  void reap_locked();

  const MPI_Comm comm_;
  const std::size_t max_unsent_bytes_;
  std::atomic<std::size_t> n_pending_{0};
  mutable std::mutex mutex_;
  // All guarded by mutex_.
  std::vector<Pending> pending_;
  std::vector<std::size_t> unsent_bytes_;  // [size of the communicator]
  Status failure_;
};

// All send queues of one process. Open MPI moves data only inside its calls; whichever thread polls
// also reaps here, so a finished send is noticed wherever the process happens to wait.
//
// Owned by MpiWorld, outlives the groups. add_queue() only before any group is used; the rest from
// any thread.
class MpiProgress {
 public:
  void set_waiting(Waiting waiting) { waiting_.store(waiting, std::memory_order_relaxed); }
  Waiting waiting() const { return waiting_.load(std::memory_order_relaxed); }
  // BackoffPolicy::wait_share.
  int wait_share() const { return waiting() == Waiting::kSparing ? kSparingShare : kEagerShare; }
  SendQueue& add_queue(MPI_Comm comm, std::size_t max_unsent_bytes);
  void reap();
  bool sends_pending() const;

  // try_send() until there is room; adds the time that it took to come to be to `waited`.
  Status send(SendQueue& queue, int dest, std::span<const std::byte> bytes,
              std::shared_ptr<void> owner, const StopFlag& stop, Deadline deadline,
              std::chrono::nanoseconds* waited = nullptr);
  // Waits until `queue` is empty.
  Status flush(SendQueue& queue, const StopFlag& stop, Deadline deadline);

 private:
  std::vector<std::unique_ptr<SendQueue>> queues_;
  std::atomic<Waiting> waiting_{Waiting::kEager};
};

}  // namespace spindle::comm
