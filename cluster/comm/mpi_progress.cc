#include "cluster/comm/mpi_progress.h"

#include <algorithm>
#include <utility>

namespace spindle::comm {
namespace {

constexpr int kTag = 0;  // every queue has a communicator of its own

}  // namespace

Status mpi_status(int code, std::string_view call) {
  if (code == MPI_SUCCESS) return {};
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) length = 0;
  return unavailable(std::string(call) +
                     " failed: " + std::string(text.data(), static_cast<std::size_t>(length)));
}

void StopFlag::stop(Status reason) {
  const std::lock_guard lock(mutex_);
  if (reason_.ok()) reason_ = std::move(reason);
  stopped_.store(true, std::memory_order_release);
}

Status StopFlag::reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

SendQueue::SendQueue(MPI_Comm comm, std::size_t max_unsent_bytes)
    : comm_(comm), max_unsent_bytes_(max_unsent_bytes) {
  int size = 0;
  MPI_Comm_size(comm, &size);
  unsent_bytes_.resize(static_cast<std::size_t>(size), 0);
}

void SendQueue::reap_locked() {
  std::erase_if(pending_, [this](Pending& pending) {
    int done = 0;
    const int code = MPI_Test(&pending.request, &done, MPI_STATUS_IGNORE);
    if (code != MPI_SUCCESS && failure_.ok()) failure_ = mpi_status(code, "MPI_Isend");
    if (code == MPI_SUCCESS && done == 0) return false;
    unsent_bytes_[static_cast<std::size_t>(pending.dest)] -= pending.n_bytes;
    return true;
  });
  n_pending_.store(pending_.size(), std::memory_order_relaxed);
}

void SendQueue::reap(bool wait_for_lock) {
  std::unique_lock lock(mutex_, std::defer_lock);
  if (wait_for_lock) {
    lock.lock();
  } else if (!lock.try_lock()) {
    return;
  }
  reap_locked();
}

Status SendQueue::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

Result<bool> SendQueue::try_send(int dest, std::span<const std::byte> bytes,
                                 std::shared_ptr<void> owner) {
  const std::lock_guard lock(mutex_);
  if (!pending_.empty()) reap_locked();
  if (!failure_.ok()) return failure_;
  std::size_t& unsent = unsent_bytes_[static_cast<std::size_t>(dest)];
  if (unsent != 0 && unsent + bytes.size() > max_unsent_bytes_) return false;
  Pending pending{.request = MPI_REQUEST_NULL,
                  .dest = dest,
                  .n_bytes = bytes.size(),
                  .owner = std::move(owner)};
  int code = MPI_Isend(bytes.data(), static_cast<int>(bytes.size()), MPI_BYTE, dest, kTag, comm_,
                       &pending.request);
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Isend");
  int done = 0;
  code = MPI_Test(&pending.request, &done, MPI_STATUS_IGNORE);
  if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Isend");
  if (done == 0) {
    unsent += pending.n_bytes;
    pending_.push_back(std::move(pending));
    n_pending_.store(pending_.size(), std::memory_order_relaxed);
  }
  return true;
}

SendQueue& MpiProgress::add_queue(MPI_Comm comm, std::size_t max_unsent_bytes) {
  queues_.push_back(std::make_unique<SendQueue>(comm, max_unsent_bytes));
  return *queues_.back();
}

void MpiProgress::reap() {
  for (auto& queue : queues_) {
    if (!queue->empty()) queue->reap(false);
  }
}

bool MpiProgress::sends_pending() const {
  return std::any_of(queues_.begin(), queues_.end(), [](const auto& q) { return !q->empty(); });
}

Status MpiProgress::send(SendQueue& queue, int dest, std::span<const std::byte> bytes,
                         std::shared_ptr<void> owner, const StopFlag& stop, Deadline deadline,
                         std::chrono::nanoseconds* waited) {
  using Clock = std::chrono::steady_clock;
  Backoff backoff({.wait_share = wait_share()});
  Clock::time_point began;
  for (;;) {
    if (stop.stopped()) return stop.reason();
    const bool is_waiting = began != Clock::time_point();
    if (is_waiting && waited != nullptr) *waited += Clock::now() - began;
    Result<bool> sent = queue.try_send(dest, bytes, owner);
    if (!sent.ok()) return sent.status();
    if (*sent) return {};
    began = Clock::now();
    if (deadline.passed()) {
      return deadline_exceeded("rank " + std::to_string(dest) +
                               " does not take what was sent to it earlier");
    }
    reap();
    backoff.pause(deadline, true);
  }
}

Status MpiProgress::flush(SendQueue& queue, const StopFlag& stop, Deadline deadline) {
  Backoff backoff({.wait_share = wait_share()});
  for (;;) {
    queue.reap(true);
    if (Status s = queue.failure(); !s.ok()) return s;
    if (queue.empty()) return {};
    if (stop.stopped()) return stop.reason();
    if (deadline.passed()) return deadline_exceeded("sends are still under way");
    reap();
    backoff.pause(deadline, true);
  }
}

}  // namespace spindle::comm
